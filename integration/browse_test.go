package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A browse is a tree of snapshots that is mounted.
type browse struct{ *mount }

// browse shows the store's snapshots on a new directory, until the test ends.
func (h *host) browse(flags ...string) browse {
	h.t.Helper()
	dir, err := os.MkdirTemp(h.dir, "browse-")
	if err != nil {
		h.t.Fatal(err)
	}
	if h.user != nil {
		if err := os.Chown(dir, int(h.user.Uid), int(h.user.Gid)); err != nil {
			h.t.Fatal(err)
		}
	}
	return h.browseOn(dir, flags...)
}

func (h *host) browseOn(dir string, flags ...string) browse {
	h.t.Helper()
	args := append([]string{"browse"}, flags...)
	r := h.run(append(args, dir)...)
	if r.code != 0 || r.stdout != "" {
		h.t.Fatalf("%s\nwant exit 0 and nothing on stdout", r)
	}
	return browse{h.mounted(dir)}
}

// path returns the image of a snapshot.
func (b browse) path(snap string) string { return filepath.Join(b.dir, "by-id", snap+".img") }

// openImage opens the image of a snapshot; it is closed with the mount, at the latest.
func (b browse) openImage(snap string) *os.File {
	b.h.t.Helper()
	b.image = b.path(snap)
	return b.open(os.O_RDONLY)
}

// holds checks that a snapshot's image has the given content.
func (b browse) holds(snap string, want []byte) {
	b.h.t.Helper()
	data, err := b.readFile(filepath.Join("by-id", snap+".img"))
	if err != nil {
		b.h.t.Fatal(err)
	}
	sameBytes(b.h.t, b.path(snap), data, want)
}

// shown lists the snapshots that are shown.
func (b browse) shown() []string {
	b.h.t.Helper()
	entries, err := os.ReadDir(filepath.Join(b.dir, "by-id"))
	if err != nil {
		b.h.t.Fatal(err)
	}
	var ids []string
	for _, e := range entries {
		ids = append(ids, strings.TrimSuffix(e.Name(), ".img"))
	}
	return ids
}

// browsed is what the status of a browse has besides.
func (b browse) browsed() (s struct {
	status
	Browse struct {
		Snapshots int
		Images    []struct {
			ID      string
			Handles int
		}
	}
}) {
	b.h.t.Helper()
	data, err := b.readFile("status.json")
	if err != nil {
		b.h.t.Fatal(err)
	}
	return parse[struct {
		status
		Browse struct {
			Snapshots int
			Images    []struct {
				ID      string
				Handles int
			}
		}
	}](b.h.t, string(data))
}

// waitClosed waits until no image is open any more.
func (b browse) waitClosed() {
	b.h.t.Helper()
	waitFor(b.h.t, "all images are closed", 30*time.Second, func() bool { return len(b.browsed().Browse.Images) == 0 })
}

// walkTree lists what is below a directory and looks at each of it, as ls -lR.
func walkTree(t testing.TB, dir string) map[string]fs.FileInfo {
	t.Helper()
	found := make(map[string]fs.FileInfo)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Stat(path) // what links lead to
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		found[name] = info
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestBrowsingFetchesNothingButRecordsUntilAnImageIsOpened(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	hostile := map[string]string{
		"env": "prod", "path": "../../../etc/passwd", "..": "..", "empty": "", "line": "a\nb\x1b[2J",
		"long": strings.Repeat("€", 256), "-rf": "-rf", "%2F": "100%",
	}
	args := []string{"snapshot", "create", "--description", "first"}
	for key, value := range hostile {
		args = append(args, "--tag", key+"="+value)
	}
	disk := diskBytes(1, 3*mib+512)
	first := h.ok(append(args, h.image(disk))...)
	vol := h.ok("volume", "create", "--snapshot", first)
	second := h.ok("snapshot", "create", "--tag", "env=prod", vol)
	gone := h.ok("snapshot", "create", h.image(randomBytes(2, mib)))
	h.ok("snapshot", "delete", gone)

	other := newHost(t, s) // has nothing cached
	gate.count("GET data")
	b := other.browse()
	tree := walkTree(t, b.dir)
	tool(t, "ls", "-lR", b.dir)
	tool(t, "find", b.dir, "-newer", b.dir, "-size", "+1k")
	tool(t, "du", "-a", b.dir)
	if n := gate.count("GET data") + gate.count("HEAD data"); n != 0 {
		t.Errorf("looking at the tree fetched %d times what snapshots hold", n)
	}
	if bases := glob(t, filepath.Join(other.state, "bases", "*", "*")); len(bases) != 0 {
		t.Errorf("looking at the tree made %v", bases)
	}
	if got, want := b.shown(), slices.Sorted(slices.Values([]string{first, second})); !slices.Equal(got, want) {
		t.Errorf("shown are %v, want %v", got, want)
	}
	shown := h.show(first)
	found, others := 0, 0
	for name, info := range tree {
		if !strings.HasSuffix(name, first+".img") {
			others++
			continue
		}
		found++
		if info.Size() != int64(len(disk)) || !info.ModTime().Equal(shown.StartTime) {
			t.Errorf("%s has %d bytes, of %s; want %d, of %s", name, info.Size(), info.ModTime(), len(disk), shown.StartTime)
		}
	}
	if want := 2 + len(hostile); found != want {
		t.Errorf("it has %d names, want %d: %q", found, want, slices.Sorted(maps.Keys(tree)))
	}
	for _, name := range []string{
		"by-tag/env/prod", "by-tag/path/%2E.%2F..%2F..%2Fetc%2Fpasswd", "by-tag/%2E./%2E.", "by-tag/empty/%empty",
		"by-tag/line/a%0Ab%1B[2J", "by-tag/%2Drf/%2Drf", "by-tag/%252F/100%25", "by-volume/" + vol,
	} {
		if tree[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}
	if t.Failed() {
		t.Logf("the tree has %q", slices.Sorted(maps.Keys(tree)))
	}

	gate.count("GET data")
	b.holds(first, disk)
	if n := gate.count("GET data"); n == 0 {
		t.Error("an image was read, and nothing fetched")
	}
	third := h.ok("snapshot", "create", h.image(disk[:mib]))
	h.ok("snapshot", "delete", second)
	waitFor(t, "the tree is what the store has", 20*time.Second, func() bool {
		return slices.Equal(b.shown(), slices.Sorted(slices.Values([]string{first, third})))
	})
	b.holds(third, disk[:mib])
}

// All that read a snapshot, however they do, fetch it once.
func TestBrowsesAndMountsShareWhatTheyFetch(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 8*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	h = newHost(t, s)
	a, b := h.browse(), h.browse()
	gate.count("GET data")
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() { a.holds(snap, disk) })
	}
	readers.Wait()
	if fetched := a.browsed().FetchedBytes; fetched > int64(len(disk))+mib {
		t.Errorf("%d bytes were fetched for %d", fetched, len(disk))
	}
	gate.count("GET data")
	b.holds(snap, disk)
	h.mount(snap, "--no-hydrate").equals(disk)
	device := h.attach(snap, "--no-hydrate")
	sameBytes(t, device, readAt(t, device, 0, len(disk)), disk)
	if n := gate.count("GET data"); n > 3 { // a leaf each, perhaps
		t.Errorf("what was here was fetched again: %d requests", n)
	}
	all := h.ok("status")
	if strings.Count(all, "browse ") != 2 || !strings.Contains(all, a.dir) {
		t.Errorf("status shows:\n%s", all)
	}
	h.fails(4, []string{"browse"}, "hydrate", a.dir)
	a.unmount()
	b.waitClosed()
	b.holds(snap, disk)
}

func TestImageIsReadableWhileItIsOpenThoughItsSnapshotIsDeleted(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 8*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	kept := h.ok("snapshot", "create", h.image(disk[:mib]))
	b := h.browse("--read-ahead=0")
	f := b.openImage(snap)
	sameBytes(t, "the beginning", readDirectly(t, f, 0, mib), disk[:mib])
	h.ok("snapshot", "delete", snap)
	waitFor(t, "its name is gone", 20*time.Second, func() bool { return slices.Equal(b.shown(), []string{kept}) })
	waitFor(t, "the kernel has forgotten its name", 20*time.Second, func() bool {
		other, err := os.Open(b.path(snap))
		if err == nil {
			_ = other.Close() // nothing was done with it
		}
		return errors.Is(err, fs.ErrNotExist)
	})
	sameBytes(t, "all of it", readDirectly(t, f, 0, len(disk)), disk)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b.waitClosed()
	waitFor(t, "its pin is gone", 20*time.Second, func() bool { return len(h.store.objects(t, "pins")) == 0 })
	h.ok("gc")
	for key := range h.store.objects(t, "data") {
		if strings.Contains(key, snap) {
			t.Errorf("%s is left", key)
		}
	}
}

// A snapshot that is deleted between the listing and the opening is not there.
func TestOpeningWhatIsListedAndGoneFindsNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	b := h.browse()
	b.shown()
	h.ok("snapshot", "delete", snap)
	if _, err := os.Open(b.path(snap)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening it: %v", err)
	}
	if shown := b.shown(); len(shown) != 0 { // the refusal made the listing due
		t.Errorf("shown are %v", shown)
	}
}

func readDirectly(t testing.TB, f *os.File, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatalf("read %s: %v", f.Name(), err)
	}
	return p
}

func TestStoreThatIsDownNeverEmptiesTheTree(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 2*mib)
	cached := h.ok("snapshot", "create", h.image(disk))
	cold := h.ok("snapshot", "create", h.image(disk[:mib]))
	h = newHost(t, s)
	b := h.browse("--read-deadline=1s")
	f := b.openImage(cached)
	sameBytes(t, "it", readDirectly(t, f, 0, len(disk)), disk)
	before := b.shown()
	h.wantHealth(b.dir, "healthy")
	if metrics := h.ok("metrics"); !strings.Contains(metrics, fmt.Sprintf("lazyvol_daemon_up{id=%q,mountpoint=%q} 1", "browse", b.dir)) {
		t.Errorf("metrics: %s", metrics)
	}
	gate.afflict(all, says(http.StatusServiceUnavailable, "SlowDown"))
	dir, err := os.MkdirTemp(h.dir, "nothing-")
	if err != nil {
		t.Fatal(err)
	}
	h.fails(1, nil, "browse", "--read-deadline=1s", dir)
	waitFor(t, "it is noticed", 30*time.Second, func() bool {
		if got := b.shown(); !slices.Equal(got, before) {
			t.Fatalf("shown are %v, want %v", got, before)
		}
		return b.status().State == "waiting-for-store"
	})
	sameBytes(t, "what is cached", readDirectly(t, f, 0, len(disk)), disk)
	if _, err := os.Open(b.path(cold)); !errors.Is(err, syscall.EIO) {
		t.Errorf("opening what is not here: %v", err)
	}
	if st := b.status(); len(st.Errors) == 0 {
		t.Errorf("the status tells nothing of it: %+v", st)
	}
	h.wantHealth(b.dir, "degraded", "store")
	gate.relieve()
	waitFor(t, "all is well again", 30*time.Second, func() bool {
		b.shown()
		return b.status().State == "browsing"
	})
	b.holds(cold, disk[:mib])
}

func TestKilledBrowseIsRecovered(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 2*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	b := h.browse()
	b.openImage(snap)
	b.kill()
	b.closeFiles()
	h.ok("unmount", b.dir)
	b = h.browseOn(b.dir)
	b.openImage(snap)
	b.kill()
	b.closeFiles()
	if all := h.wantHealth("", "failed", "daemon"); !strings.Contains(fmt.Sprint(all), "'lazyvol browse' on the same directory") {
		t.Errorf("of a dead browse it says %+v", all)
	}
	b = h.browseOn(b.dir) // on the dead mountpoint
	b.holds(snap, disk)
	h.fails(4, []string{"mounted"}, "browse", b.dir)
	b.unmount()
	if left := h.store.objects(t, "pins"); len(left) > 2 { // of the killed: see endDead
		t.Errorf("pins are left: %v", left)
	}
	sessions := glob(t, filepath.Join(h.state, "mounts", "*", "session.json"))
	for _, file := range sessions {
		data, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(data), snap) {
			t.Errorf("a session is left that is none of an image: %s, %v", data, err)
		}
	}
	h.fails(2, nil, "browse")
	h.fails(2, []string{"--open-images"}, "browse", "--open-images=0", b.dir)
	h.fails(1, []string{"does not exist"}, "browse", filepath.Join(h.dir, "missing"))
	h.fails(3, nil, "--store=file://"+filepath.Join(h.dir, "nowhere"), "browse", b.dir)
}

func TestOrdinaryUserBrowsesThroughFusermount(t *testing.T) {
	t.Parallel()
	h := newUserHost(t)
	disk := diskBytes(1, 5*mib)
	snap := h.ok("snapshot", "create", writeImage(t, filepath.Join(h.dir, "disk.img"), disk))
	b := h.browse()
	b.holds(snap, disk)
	if _, err := os.ReadDir(filepath.Join(b.dir, "by-id")); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("another user, root at that, gets in: %v", err)
	}
	b.kill()
	b = h.browseOn(b.dir)
	b.holds(snap, disk)
	b.unmount()
}

func TestOthersBrowseOnRequestOnly(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	b := h.browseOn(publicDir(t), "--allow-other", "--uid=61234", "--gid=61235")
	err := asUser(nobody, func() error {
		f, err := os.Open(b.path(snap))
		if err != nil {
			return err
		}
		return f.Close()
	})
	if err != nil {
		t.Errorf("another user: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(b.path(snap), &st); err != nil || st.Uid != 61234 || st.Gid != 61235 || st.Mode&0o777 != 0o444 {
		t.Errorf("the image is %d:%d's, of mode %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
}

// However many images are read, and whatever their size, a browse takes what it was
// given: on the disk, in memory, in open images.
func TestBrowseKeepsItsBounds(t *testing.T) {
	t.Parallel()
	const n, each, limit, memory = 8, 12 * mib, 24 * mib, 96 * mib
	s := newS3Store(t)
	h := newHost(t, s)
	disks := make([][]byte, n)
	snaps := make([]string, n)
	for i := range disks {
		disks[i] = randomBytes(uint64(i), each)
		snaps[i] = h.ok("snapshot", "create", h.image(disks[i]))
	}
	readAll := func(b browse) {
		var readers sync.WaitGroup
		for i := range disks {
			readers.Go(func() {
				data, err := exec.Command("cat", b.path(snaps[i])).Output()
				if err != nil || string(data) != string(disks[i]) {
					t.Errorf("%s: %d bytes, %v", snaps[i], len(data), err)
				}
			})
		}
		readers.Wait()
	}
	h = newHost(t, s)
	b := h.browse("--memory=96MiB")
	atRest := openFiles(t, b.pid)
	readAll(b)
	if peak := peakMemory(t, b.pid); peak > memory+memory/5 && os.Getenv("LAZYVOL_RACE") == "" {
		t.Errorf("the daemon took %d MiB of memory, of %d", peak/mib, memory/mib)
	}
	b.waitClosed()
	waitFor(t, fmt.Sprintf("no more files are open than the %d at rest", atRest), 20*time.Second, func() bool { return openFiles(t, b.pid) <= atRest+2 })
	waitFor(t, "no pin is left", 20*time.Second, func() bool { return len(s.objects(t, "pins")) == 0 })
	b.unmount()

	h = newHost(t, s)
	b = h.browse("--cache-size=24MiB")
	most := h.watchBases()
	readAll(b)
	if used := most(); used > limit+limitSlack {
		t.Errorf("the bases had up to %d bytes, with a limit of %d", used, limit)
	}
	b.unmount()

	b = h.browse("--open-images=2")
	first, second := b.openImage(snaps[0]), b.openImage(snaps[1])
	if _, err := os.Open(b.path(snaps[2])); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("opening a third image: %v", err)
	}
	sameBytes(t, "the first", readDirectly(t, first, 0, mib), disks[0][:mib])
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it makes room", 10*time.Second, func() bool {
		for _, i := range b.browsed().Browse.Images {
			if i.ID == snaps[0] {
				return i.Handles == 0
			}
		}
		return true
	})
	b.holds(snaps[2], disks[2])
	sameBytes(t, "the second", readDirectly(t, second, 0, each), disks[1])
}

// openFiles counts a process's files, but for connections to the store.
func openFiles(t testing.TB, pid int) (n int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && !strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

func TestEncryptedImageOpensWithItsKeyOnly(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	file := filepath.Join(h.dir, "key")
	key := h.ok("key", "generate", file)
	disk := randomBytes(1, mib)
	sealed := h.ok("snapshot", "create", "--key", key, h.image(disk))
	plain := h.ok("snapshot", "create", h.image(disk))
	if err := os.Rename(file, file+".away"); err != nil {
		t.Fatal(err)
	}
	b := h.browse()
	if _, err := os.Open(b.path(sealed)); !errors.Is(err, syscall.EACCES) {
		t.Errorf("without its key: %v", err)
	}
	b.holds(plain, disk)
	if err := os.Rename(file+".away", file); err != nil {
		t.Fatal(err)
	}
	b.holds(sealed, disk)
}

// A journal that must not be replayed, on a device that cannot be written.
func TestFilesystemInABrowsedImageIsMounted(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol, _, dir := h.newFilesystem("ext4")
	realFiles(t, dir, "strings")
	tool(t, "sync", "-f", dir)
	snap := h.ok("snapshot", "create", vol) // in use: its journal is dirty
	b := h.browse()
	image := glob(t, filepath.Join(b.dir, "by-volume", vol, "*.img"))[0]
	device := tool(t, "losetup", "--find", "--show", "--read-only", "--direct-io=on", image)
	t.Cleanup(func() {
		if err := detachLoop(device); err != nil {
			t.Error(err)
		}
	})
	sameFiles(t, filepath.Join(mountFS(t, device, "ro,noload"), "strings"), filepath.Join(tool(t, "go", "env", "GOROOT"), "src/strings"))
	h.fails(4, []string{"use"}, "unmount", b.dir)
	if images := b.browsed().Browse.Images; len(images) != 1 || images[0].ID != snap || images[0].Handles == 0 {
		t.Errorf("open are %+v", images)
	}
}
