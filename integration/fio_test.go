package integration

import (
	"bytes"
	"os"
	"testing"
)

// fio runs fio on a file or device.
func fio(t testing.TB, file string, options ...string) {
	t.Helper()
	args := append([]string{"--name=" + t.Name(), "--filename=" + file, "--minimal", "--thread", "--allow_file_create=0", "--verify_state_save=0"}, options...)
	tool(t, "fio", args...)
}

// verifying are the options of a run that writes at random and then reads all
// of it back.
func verifying(seed, direct string) []string {
	return []string{
		"--rw=randwrite", "--bsrange=4k-128k", "--size=48M", "--verify=crc32c", "--do_verify=1",
		"--verify_fatal=1", "--randseed=" + seed, "--direct=" + direct, "--ioengine=libaio", "--iodepth=16", "--end_fsync=1",
	}
}

func TestFioVerifiesWhatItWroteToAVolume(t *testing.T) {
	t.Parallel()
	for name, direct := range map[string]string{"buffered": "0", "direct": "1"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, newS3Store(t))
			disk := randomBytes(1, 64*mib)
			vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
			m := h.mount(vol) // and is hydrated meanwhile
			fio(t, m.image, verifying("1", direct)...)
			sameBytes(t, "what fio left alone", m.read(48*mib, 16*mib), disk[48*mib:])

			written := m.read(0, 64*mib)
			snap := h.ok("snapshot", "create", vol)
			sameBytes(t, "the snapshot", newHost(t, h.store).exported(snap), written)
			m.kill()
			m = m.again(vol)
			m.equals(written)
		})
	}
}

func TestFioVerifiesSmallUnalignedWrites(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, 16*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol)
	fio(t, m.image, "--rw=randwrite", "--bs=512", "--size=8M", "--io_size=2M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1",
		"--direct=1", "--ioengine=libaio", "--iodepth=8", "--numjobs=2", "--offset_increment=8M")
}

func TestFioVerifiesThroughALoopDevice(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--size", "64MiB")
	device := h.attach(vol)
	fio(t, device, verifying("2", "1")...)
	h.ok("snapshot", "create", vol)
	fio(t, device, append(verifying("3", "1"), "--numjobs=2", "--size=24M", "--offset_increment=32M")...)
	written := readAt(t, device, 0, 64*mib)
	snap := h.ok("snapshot", "create", vol)
	sameBytes(t, "the snapshot", h.exported(snap), written)
}

func TestSnapshotsUnderLoadAreMomentsOfIt(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--size", "16MiB")
	m := h.mount(vol)
	f := m.open(os.O_RDWR)

	// The writer fills the pages in order with a generation, again and again:
	// at any moment there is one generation up to a page, and the one before
	// from there on.
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		page := make([]byte, pageSize)
		for generation := byte(1); ; generation++ {
			for i := range page {
				page[i] = generation
			}
			for off := int64(0); off < 16*mib; off += pageSize {
				select {
				case <-stop:
					stopped <- nil
					return
				default:
				}
				if _, err := f.WriteAt(page, off); err != nil {
					stopped <- err
					return
				}
			}
		}
	}()
	var snaps []string
	for range 6 {
		snaps = append(snaps, h.ok("snapshot", "create", vol))
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	for _, snap := range snaps {
		content := h.exported(snap)
		changes := 0
		for off := 0; off < len(content); off += pageSize {
			page := content[off : off+pageSize]
			if !bytes.Equal(page, bytes.Repeat(page[:1], pageSize)) {
				t.Fatalf("%s has a torn page at %d", snap, off)
			}
			if off > 0 && page[0] != content[off-1] {
				if changes++; changes > 1 || page[0] != content[off-1]-1 {
					t.Fatalf("%s is no moment: generation %d follows %d at %d", snap, page[0], content[off-1], off)
				}
			}
		}
	}
}
