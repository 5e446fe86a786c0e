package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestBlockDeviceIsASource(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := diskBytes(1, 9*mib+512)
	device := loopDevice(t, h.image(disk))
	snap := h.ok("snapshot", "create", device)
	sameBytes(t, "the export", h.exported(snap), disk)
}

func TestMountedBlockDeviceIsOnlySnapshottedFrozen(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	device := loopDevice(t, sparse(t, filepath.Join(h.dir, "fs.img"), 64*mib))
	tool(t, "mkfs.ext4", "-q", device)
	dir := mountFS(t, device, "rw")
	realFiles(t, dir, "bufio", "fmt")

	h.fails(4, []string{"mounted", dir}, "snapshot", "create", device)
	if found := h.list("--all"); len(found) != 0 {
		t.Errorf("the refusal left %+v", found)
	}

	snap := h.ok("snapshot", "create", "--freeze", dir, device)
	if err := os.WriteFile(filepath.Join(dir, "after"), []byte("thawed"), 0o644); err != nil {
		t.Errorf("the filesystem is not writable after the snapshot: %v", err)
	}
	restored := h.export(snap)
	tool(t, "e2fsck", "-f", "-p", restored) // replays the journal
	copied := mountFS(t, restored, "loop,ro")
	if err := os.Remove(filepath.Join(dir, "after")); err != nil {
		t.Fatal(err)
	}
	sameFiles(t, copied, dir)

	tool(t, "mount", "-o", "remount,ro", dir)
	h.ok("snapshot", "create", device) // nobody can write
}

func TestImageThatChangesWhileItIsReadFails(t *testing.T) {
	t.Parallel()
	change := map[string]func(path string) error{
		"written": func(path string) error {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), 5)
			return err
		},
		"shrunk": func(path string) error { return os.Truncate(path, mib) },
		"grown":  func(path string) error { return os.Truncate(path, 1024*mib) },
	}
	for name, change := range change {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			h := newHost(t, s)
			path := h.image(randomBytes(1, 40*mib))
			gate.close(requests, puts("packs"))
			create := h.begin("snapshot", "create", path)
			gate.waitHolding(t)
			if err := change(path); err != nil {
				t.Fatal(err)
			}
			gate.open()
			create.wait().failed(t, 1, "changed")
			h.leftNothing()
		})
	}
}

func TestInterruptedCreateIsNeverASnapshot(t *testing.T) {
	t.Parallel()
	for name, hold := range map[string]string{"at the intent": "intents", "in the packs": "packs", "in the leaves": "leaves", "at the outcome": "outcomes"} {
		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
			t.Run(name+" by "+sig.String(), func(t *testing.T) {
				t.Parallel()
				s, gate := newGatedStore(t)
				h := newHost(t, s)
				path := h.image(randomBytes(1, 20*mib))
				gate.close(requests, puts(hold))
				create := h.begin("snapshot", "create", path)
				gate.waitHolding(t)
				create.signal(sig)
				gate.waitLeft(t)
				gate.open() // the command tells the store that it gave up
				create.wait().failed(t, 130, "interrupted")
				h.leftNothing()
			})
		}
	}
}

func TestKilledCreateIsNeverASnapshot(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	path := h.image(randomBytes(1, 20*mib))
	gate.close(requests, puts("leaves"))
	create := h.begin("snapshot", "create", path)
	gate.waitHolding(t)
	create.signal(syscall.SIGKILL)
	create.wait()
	gate.open()

	pending := h.list()
	if len(pending) != 1 || pending[0].State != "pending" {
		t.Fatalf("list: %+v, want one pending snapshot", pending)
	}
	id := pending[0].SnapshotId
	h.fails(4, []string{"pending"}, "mount", id, t.TempDir())
	h.fails(4, []string{"pending"}, "snapshot", "export", id, filepath.Join(h.dir, "out.img"))
	h.fails(4, []string{"pending"}, "volume", "create", "--snapshot", id)
	if _, err := os.Stat(filepath.Join(h.dir, "out.img")); !os.IsNotExist(err) {
		t.Errorf("the refused export left a file: %v", err)
	}
	h.ok("snapshot", "delete", id) // aborts it
	h.leftNothing()
}

// leftNothing checks that the store shows no snapshot and that, once
// collected, no data is in it.
func (h *host) leftNothing() {
	h.t.Helper()
	if found := h.list(); len(found) != 0 {
		h.t.Errorf("list shows %+v", found)
	}
	h.ok("gc")
	if left := h.store.objects(h.t, "data"); len(left) != 0 {
		h.t.Errorf("left in the store: %v", left)
	}
	if all := h.list("--all"); len(all) > 1 || len(all) == 1 && all[0].State != "error" {
		h.t.Errorf("list --all shows %+v", all)
	}
}

func TestUnreadableSourcesAreNamed(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for name, c := range map[string]struct {
		path string
		want string
	}{
		"missing":   {filepath.Join(h.dir, "nothing.img"), "no such file"},
		"directory": {h.dir, "directory"},
		"device":    {"/dev/null", "/dev/null"},
	} {
		t.Run(name, func(t *testing.T) {
			r := h.run("snapshot", "create", c.path)
			if r.code != 1 && r.code != 3 || !strings.Contains(r.stderr, c.want) {
				t.Errorf("%s\nwant %q", r, c.want)
			}
		})
	}
}

func TestCreateInBackgroundPrintsAPendingSnapshot(t *testing.T) {
	t.Parallel()
	disk := randomBytes(1, 8*mib)
	for name, prepare := range map[string]func(h *host) (source string){
		"image": func(h *host) string { return h.image(disk) },
		"mounted volume": func(h *host) string {
			vol := h.ok("volume", "create", "--size", "8MiB")
			h.mount(vol).write(disk, 0)
			return vol
		},
		"unmounted volume": func(h *host) string {
			vol := h.ok("volume", "create", "--size", "8MiB")
			m := h.mount(vol)
			m.write(disk, 0)
			m.unmount()
			return vol
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			h := newHost(t, s)
			source := prepare(h)
			gate.close(requests, puts("packs"))
			snap := h.ok("snapshot", "create", "--no-wait", source)
			if info := h.show(snap); info.State != "pending" {
				t.Errorf("at first: %+v", info)
			}
			gate.open()
			waitFor(t, "the snapshot completes", time.Minute, func() bool { return h.show(snap).State == "completed" })
			sameBytes(t, "the export", h.exported(snap), disk)
			if name == "unmounted volume" {
				waitFor(t, "the background is done with it", 20*time.Second, func() bool {
					return h.run("volume", "delete", source).code == 0
				})
			}
		})
	}
}
