package integration

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/crypt/kmstest"
)

// plainMark is what is looked for where nothing may be in clear.
const plainMark = "this sentence must be nowhere in clear "

// markedDisk is a disk full of plainMark, compressible in one half.
func markedDisk(n int) []byte {
	disk := diskBytes(7, n)
	for at := 0; at+len(plainMark) <= n/2; at += 4099 {
		copy(disk[at:], plainMark)
	}
	copy(disk[n/2:], bytes.Repeat([]byte(plainMark), n/2/len(plainMark)))
	return disk
}

// nowhereInClear fails the test if a file below one of the folders has plainMark, or
// bytes of the disk, in it.
func nowhereInClear(t testing.TB, disk []byte, folders ...string) {
	t.Helper()
	looked := 0
	windows := [][]byte{[]byte(plainMark[:16])}
	for at := 1000; at+24 < len(disk)/2; at += len(disk) / 64 {
		if w := disk[at : at+24]; bytes.Count(w, []byte{0}) < 4 {
			windows = append(windows, w)
		}
	}
	for _, folder := range folders {
		err := filepath.WalkDir(folder, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			looked += len(data)
			for _, w := range windows {
				if at := bytes.Index(data, w); at >= 0 {
					t.Errorf("%s has %q at %d, in clear", path, w, at)
					break
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if looked < len(disk)/4 {
		t.Errorf("only %d bytes were looked at", looked)
	}
}

func TestEncryptedLineageIsNowhereInClear(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	key := h.ok("key", "generate", filepath.Join(h.dir, "key"))
	disk := markedDisk(24 * mib)
	snap := h.ok("snapshot", "create", "--key", key, h.image(disk))
	if info := h.show(snap); !info.Encrypted || info.KmsKeyId != key {
		t.Errorf("it is described as %+v", info)
	}

	image := h.mount(snap, "--record-trace=boot")
	image.equals(disk)
	image.waitState("hydrated", time.Minute)
	image.equals(disk) // from the local file
	image.unmount()

	vol := h.ok("volume", "create", "--snapshot", snap)
	m := h.mount(vol, "--trace=boot")
	for i, text := range []string{"first", "second", "third"} {
		copy(disk[i*5*mib+123:], plainMark+text)
		m.write([]byte(plainMark+text), int64(i*5*mib+123)) // neither pages nor sectors
	}
	whole := bytes.Repeat([]byte(plainMark), 3*4096/len(plainMark)+1)[:3*4096]
	copy(disk[9*mib:], whole)
	m.write(whole, 9*mib)
	m.equals(disk)
	nowhereInClear(t, disk, s.files, h.state)
	m.kill()
	m = m.again(vol)
	m.equals(disk)
	second := h.ok("snapshot", "create", vol)
	m.equals(disk)
	m.write([]byte(plainMark), 3*mib)
	nowhereInClear(t, disk, s.files, h.state)
	m.unmount()

	other := newHost(t, s) // which has the key file at the same path
	sameBytes(t, "the second snapshot elsewhere", other.exported(second), disk)
	h.ok("snapshot", "verify", "--all")
	h.ok("snapshot", "delete", snap)
	h.ok("gc")
	sameBytes(t, "the second snapshot without the first", other.exported(second), disk)
	nowhereInClear(t, disk, s.files, h.state)
}

func TestBlankEncryptedVolumeIsNowhereInClear(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	key := h.ok("key", "generate", filepath.Join(h.dir, "key"))
	h.env = append(h.env, "LAZYVOL_KEY="+key) // by default
	vol := h.ok("volume", "create", "--size", "16MiB")
	disk := markedDisk(16 * mib)
	m := h.mount(vol)
	m.write(disk, 0)
	nowhereInClear(t, disk, h.state)
	snap := h.ok("snapshot", "create", vol)
	m.equals(disk)
	m.unmount()
	nowhereInClear(t, disk, h.state, h.store.files)
	sameBytes(t, "the snapshot", h.exported(snap), disk)
	h.fails(2, []string{"--key"}, "snapshot", "create", "--key", key, vol)
}

func TestKeysThatCannotBeHadAreNamed(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	file := filepath.Join(h.dir, "key")
	key := h.ok("key", "generate", file)
	disk := markedDisk(8 * mib)
	snap := h.ok("snapshot", "create", "--key", key, h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	m := h.mount(vol)
	away := file + ".away"
	if err := os.Rename(file, away); err != nil {
		t.Fatal(err)
	}
	m.equals(disk) // it has its key
	m.write([]byte(plainMark), 4*mib)
	copy(disk[4*mib:], plainMark)
	m.unmount()

	dir := filepath.Join(h.dir, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(h.dir, "out.img")
	refused := func(code int, want ...string) {
		t.Helper()
		before := entries(t, filepath.Join(h.state, "mounts"))
		for _, args := range [][]string{{"mount", snap, dir}, {"mount", vol, dir}, {"snapshot", "export", snap, out}, {"volume", "create", "--snapshot", snap}, {"snapshot", "create", vol}} {
			h.fails(code, want, args...)
		}
		if after := entries(t, filepath.Join(h.state, "mounts")); len(after) != len(before) {
			t.Errorf("the refusals left %v", after)
		}
		if _, err := os.Stat(out); !os.IsNotExist(err) {
			t.Errorf("a refused export left a file: %v", err)
		}
	}
	refused(3, file)
	if info := h.show(snap); !info.Encrypted { // without the key
		t.Error("it is not described as encrypted")
	}
	h.ok("snapshot", "tag", snap, "a=b")
	h.ok("key", "generate", file)
	refused(4, "wrong key")
	if err := os.Rename(away, file); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	refused(1, "chmod")
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	m = h.mountOn(dir, vol)
	m.equals(disk)
	m.unmount()
}

func TestKMSMayGoAwayWhileAVolumeIsMounted(t *testing.T) {
	t.Parallel()
	service := kmstest.New()
	server := httptest.NewServer(service)
	t.Cleanup(server.Close)
	arn := service.CreateKey("alias/disks")
	s := newDirStore(t)
	s.env = append(s.env, "AWS_ENDPOINT_URL_KMS="+server.URL, "AWS_REGION="+kmstest.Region, "AWS_ACCESS_KEY_ID=test", "AWS_SECRET_ACCESS_KEY=test")
	h := newHost(t, s)
	disk := markedDisk(8 * mib)
	snap := h.ok("snapshot", "create", "--key", "awskms:///alias/disks", h.image(disk))
	if info := h.show(snap); !strings.Contains(info.KmsKeyId, arn) {
		t.Errorf("the key is recorded as %q", info.KmsKeyId)
	}
	vol := h.ok("volume", "create", "--snapshot", snap)
	m := h.mount(vol, "--no-hydrate")
	service.SetState(arn, kmstest.Disabled)
	m.write([]byte(plainMark), 0)
	copy(disk, plainMark)
	m.equals(disk) // fetched, and opened, without the service
	second := h.ok("snapshot", "create", vol)
	m.unmount()
	h.fails(4, []string{"disabled", arn}, "snapshot", "export", second, filepath.Join(h.dir, "out.img"))
	service.SetState(arn, kmstest.Enabled)
	sameBytes(t, "the snapshot", h.exported(second), disk)
	nowhereInClear(t, disk, h.state, h.store.files)
}

func TestShreddedLineageIsGoneForGood(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	key := h.ok("key", "generate", filepath.Join(h.dir, "key"))
	disk := markedDisk(8 * mib)
	snap := h.ok("snapshot", "create", "--key", key, h.image(disk))
	plain := h.ok("snapshot", "create", h.image(disk))
	lineage := snap[len("snap-"):][:8]
	h.fails(2, []string{"--yes"}, "key", "shred", lineage)
	m := h.mount(snap)
	h.fails(4, []string{"in use"}, "key", "shred", "--yes", lineage)
	m.unmount()
	h.fails(4, []string{"not encrypted"}, "key", "shred", "--yes", plain)
	h.fails(3, nil, "key", "shred", "--yes", "12345678")
	h.ok("key", "shred", "--yes", lineage)
	h.ok("key", "shred", "--yes", lineage) // again is fine
	dir := filepath.Join(h.dir, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{"shredded"}, "mount", snap, dir)
	if info := h.show(snap); info.State != "error" {
		t.Errorf("it is in state %s", info.State)
	}
	h.ok("gc")
	for object := range h.store.objects(t, "data") {
		if strings.Contains(object, snap) {
			t.Errorf("%s is still there", object)
		}
	}
	h.ok("snapshot", "delete", snap)
	h.ok("snapshot", "verify", "--all")
	sameBytes(t, "the snapshot that is not encrypted", h.exported(plain), disk)
}

func TestNobodyLooksIntoADaemonThatHasAKey(t *testing.T) {
	t.Parallel()
	h := newUserHost(t)
	key := h.ok("key", "generate", filepath.Join(h.dir, "key"))
	image := writeImage(t, filepath.Join(h.dir, "disk.img"), markedDisk(4*mib))
	for _, test := range []struct {
		snap  string
		owner uint32 // of what others of the same user may look into
	}{{h.ok("snapshot", "create", image), nobody}, {h.ok("snapshot", "create", "--key", key, image), 0}} {
		m := h.mount(test.snap)
		info, err := os.Stat(fmt.Sprintf("/proc/%d/mem", m.pid))
		if err != nil {
			t.Fatal(err)
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != test.owner {
			t.Errorf("the memory of the daemon of %s is that of user %d, not %d", test.snap, uid, test.owner)
		}
		m.unmount()
	}
}
