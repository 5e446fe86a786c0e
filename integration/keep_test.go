package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestALockedSnapshotIsNotDeleted(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := diskBytes(1, 4*mib)
	snap := h.ok("snapshot", "create", h.image(disk))

	for what, args := range map[string][]string{
		"no mode":          {"--days", "1"},
		"another mode":     {"--mode", "strict", "--days", "1"},
		"no time":          {"--mode", "governance"},
		"two times":        {"--mode", "governance", "--days", "1", "--until", "2030-01-01"},
		"too many days":    {"--mode", "governance", "--days", "36501"},
		"past":             {"--mode", "governance", "--until", "2020-01-01"},
		"no date":          {"--mode", "governance", "--until", "soon"},
		"no cool-off":      {"--mode", "compliance", "--days", "1", "--cool-off", "0"},
		"too long a one":   {"--mode", "compliance", "--days", "1", "--cool-off", "73"},
		"one for the weak": {"--mode", "governance", "--days", "1", "--cool-off", "1"},
	} {
		t.Run(what, func(t *testing.T) {
			h.in(t).fails(2, nil, append([]string{"snapshot", "lock", snap}, args...)...)
		})
	}
	h.fails(4, []string{"not locked", "IncorrectState"}, "snapshot", "unlock", snap)
	h.fails(3, []string{"InvalidSnapshot.NotFound"}, "snapshot", "lock", "snap-00000001000000001", "--mode", "governance", "--days", "1")

	h.ok("snapshot", "lock", snap, "--mode", "governance", "--days", "7")
	if show := h.ok("snapshot", "show", "--json", snap); !strings.Contains(show, `"LockState": "governance"`) {
		t.Errorf("show: %s", show)
	}
	h.fails(4, []string{snap, "governance", "until 20", "SnapshotLocked"}, "snapshot", "delete", snap)
	h.fails(4, []string{"SnapshotLocked"}, "snapshot", "delete", "--retain", "7d", snap)
	h.ok("gc")
	h.ok("snapshot", "tag", snap, "a=b") // keeps the lock
	h.fails(4, []string{"SnapshotLocked"}, "snapshot", "delete", snap)
	h.ok("snapshot", "lock", snap, "--mode", "compliance", "--days", "7", "--cool-off", "1")
	h.ok("snapshot", "unlock", snap)
	h.ok("snapshot", "lock", snap, "--mode", "compliance", "--days", "7")
	h.fails(4, []string{"compliance", "SnapshotLocked"}, "snapshot", "unlock", snap)
	h.fails(4, []string{"extended", "SnapshotLocked"}, "snapshot", "lock", snap, "--mode", "compliance", "--days", "6")
	h.fails(4, []string{"extended", "SnapshotLocked"}, "snapshot", "lock", snap, "--mode", "governance", "--days", "8")
	h.ok("snapshot", "lock", snap, "--mode", "compliance", "--days", "8")
	h.fails(4, []string{"SnapshotLocked"}, "snapshot", "delete", snap)
	sameBytes(t, "the export", h.exported(snap), disk)
}

func TestADeletedSnapshotComesBackFromTheBin(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	disk := diskBytes(1, 4*mib)
	snap := h.ok("snapshot", "create", "--tag", "env=prod", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)

	h.fails(2, nil, "policy", "set")
	h.fails(2, []string{"366d"}, "policy", "set", "--retain", "366d")
	h.ok("policy", "set", "--retain", "1h", "--retain", "env=prod:2d")
	if out := h.ok("policy", "show"); !strings.Contains(out, "env=prod") || !strings.Contains(out, "2d") || !strings.Contains(out, "unblocked") {
		t.Errorf("policy: %s", out)
	}
	r := h.run("snapshot", "delete", snap)
	if r.code != 0 || r.stdout != snap+"\n" || !strings.Contains(r.stderr, "recycle bin until "+time.Now().Add(48*time.Hour).Format("2006-01")) {
		t.Fatalf("delete: %s", r)
	}
	another := h.image(disk)
	for what, args := range map[string][]string{
		"mount":  {"mount", snap, t.TempDir()},
		"volume": {"volume", "create", "--snapshot", snap},
		"show":   {"snapshot", "show", snap},
		"diff":   {"snapshot", "diff", snap, snap},
		"export": {"snapshot", "export", snap, another + ".out"},
		"parent": {"snapshot", "create", "--parent", snap, another},
		"share":  {"snapshot", "share", snap, "--add", "123456789012"},
		"lock":   {"snapshot", "lock", snap, "--mode", "governance", "--days", "1"},
		"delete": {"snapshot", "delete", snap},
	} {
		t.Run(what, func(t *testing.T) { h.in(t).fails(3, []string{"recycle bin", "InvalidSnapshot.NotFound"}, args...) })
	}
	if listed := h.list("--all"); len(listed) != 0 {
		t.Errorf("listed: %+v", listed)
	}
	var bin struct {
		Snapshots []struct {
			SnapshotId                              string
			RecycleBinEnterTime, RecycleBinExitTime time.Time
		}
	}
	if err := json.Unmarshal([]byte(h.ok("snapshot", "list-bin", "--json")), &bin); err != nil {
		t.Fatal(err)
	}
	if len(bin.Snapshots) != 1 || bin.Snapshots[0].SnapshotId != snap || bin.Snapshots[0].RecycleBinExitTime.Sub(bin.Snapshots[0].RecycleBinEnterTime) != 48*time.Hour {
		t.Errorf("bin: %+v", bin)
	}
	if out := h.ok("snapshot", "list", "--bin"); !strings.Contains(out, snap) {
		t.Errorf("list --bin: %s", out)
	}
	h.fails(2, []string{"--bin"}, "snapshot", "list", "--bin", "--all")
	before := s.dataBytes(t)
	h.ok("gc")
	if after := s.dataBytes(t); after != before {
		t.Errorf("gc freed %d of %d bytes while the snapshot was in the bin", before-after, before)
	}
	h.ok("snapshot", "tag", snap, "kept=yes")
	m := h.mount(vol) // which pins it
	m.equals(disk)
	m.unmount()

	h.ok("snapshot", "restore-deleted", snap)
	h.fails(4, []string{"IncorrectState"}, "snapshot", "restore-deleted", snap)
	if out := h.ok("snapshot", "show", snap); !strings.Contains(out, "kept") || !strings.Contains(out, "prod") {
		t.Errorf("show: %s", out)
	}
	sameBytes(t, "the restored one", h.exported(snap), disk)

	// When its time is over, it is gone for good.
	h.ok("policy", "set", "--retain", "none", "--retain", "env=prod:none")
	h.ok("volume", "delete", vol)
	h.ok("snapshot", "delete", "--retain", "1s", snap)
	waitFor(t, "the bin is empty", 30*time.Second, func() bool {
		h.ok("gc")
		return h.ok("snapshot", "list-bin") == ""
	})
	h.fails(3, nil, "snapshot", "restore-deleted", snap)
	if left := s.dataBytes(t); left != 0 {
		t.Errorf("%d bytes are left", left)
	}
}

func TestPruneDeletesIntoTheBin(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--size", "1MiB")
	first := h.ok("snapshot", "create", vol)
	locked := h.ok("snapshot", "create", vol)
	last := h.ok("snapshot", "create", vol)
	h.ok("snapshot", "lock", locked, "--mode", "governance", "--days", "1")
	h.ok("policy", "set", "--retain", "7d")
	r := h.run("snapshot", "prune", "--keep-last", "1")
	if r.code != 4 || r.stdout != first+"\n" || !strings.Contains(r.stderr, "SnapshotLocked") {
		t.Errorf("%s\nwant exit 4, and all deleted that is not locked", r)
	}
	if out := h.ok("snapshot", "list-bin"); !strings.Contains(out, first) || strings.Contains(out, locked) || strings.Contains(out, last) {
		t.Errorf("bin: %s", out)
	}
}

func TestPublicSharingCanBeBlocked(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(make([]byte, mib)))
	h.ok("snapshot", "share", snap, "--add", "all")
	h.ok("policy", "set", "--public-access", "block-new-sharing")
	other := h.ok("snapshot", "create", h.image(make([]byte, mib)))
	h.fails(4, []string{"block-new-sharing", "OperationNotPermitted"}, "snapshot", "share", other, "--add", "all")
	h.ok("snapshot", "share", other, "--add", "123456789012")
	h.ok("policy", "set", "--public-access", "block-all-sharing")
	if show := h.ok("snapshot", "show", snap); !strings.Contains(show, "all (blocked") {
		t.Errorf("show: %s", show)
	}
	if show := h.ok("snapshot", "show", "--json", other); !strings.Contains(show, `"UserId": "123456789012"`) {
		t.Errorf("show: %s", show)
	}
	h.ok("policy", "set", "--public-access", "unblocked")
	if out := h.ok("snapshot", "share", snap); out != "all" {
		t.Errorf("shared with %q", out)
	}
	h.ok("snapshot", "share", snap, "--remove", "all", "--add", "someone")
	if out := h.ok("snapshot", "share", snap); out != "someone" {
		t.Errorf("shared with %q", out)
	}
	h.fails(2, []string{"InvalidUserID.Malformed"}, "snapshot", "share", snap, "--add", "no body")
	h.fails(2, []string{"InvalidUserID.Malformed", "501"}, "snapshot", "share", snap, "--add", strings.TrimSuffix(strings.Repeat("x,", 501), ","))
	h.fails(1, []string{"no bucket"}, "snapshot", "share", snap, "--policy")
	h.fails(2, []string{"--policy"}, "snapshot", "share", snap, "--policy", "--add", "x")
	h.fails(4, []string{"not shared with y"}, "snapshot", "share", snap, "--policy", "--account", "y")
}

// With the policy that share prints, and credentials that may only read, another
// account mounts and copies what is shared, and gets at nothing else.
func TestAnotherAccountUsesWhatIsShared(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	vol := h.ok("volume", "create", "--size", "64MiB")
	m := h.mount(vol)
	disk := make([]byte, 64*mib)
	write := func(seed uint64, off, length int) {
		copy(disk[off:], randomBytes(seed, length))
		m.write(disk[off:off+length], int64(off))
	}
	write(1, 0, 40*mib)
	first := h.ok("snapshot", "create", vol)
	write(2, 4*mib, 6*mib)
	shared := h.ok("snapshot", "create", vol)
	want := slices.Clone(disk)
	write(3, 20*mib, 6*mib)
	later := h.ok("snapshot", "create", vol)
	stranger := h.ok("snapshot", "create", h.image(diskBytes(9, 4*mib)))
	h.ok("snapshot", "delete", first)

	access, secret := s.server.NewUser(t)
	h.ok("snapshot", "share", shared, "--add", access)
	if told := h.ok("events", "--json"); strings.Count(told, `"shareSnapshot"`) != 1 || !strings.Contains(told, access) {
		t.Errorf("events: %s", told)
	}
	printed := h.run("snapshot", "share", shared, "--policy", "--account", access)
	if printed.code != 0 || !strings.Contains(printed.stderr, "also shows") {
		t.Fatalf("%s", printed)
	}
	if len(printed.stdout) > 20*kib { // S3's limit
		t.Errorf("the policy has %d bytes", len(printed.stdout))
	}
	guest := newHost(t, s)
	guest.env = s.server.EnvFor(access, secret)
	guest.fails(1, []string{"denied"}, "mount", shared, t.TempDir())
	s.server.SetPolicy(t, s.bucket, printed.stdout)

	dir := t.TempDir()
	r := guest.run("mount", shared, dir)
	if r.code != 0 || !strings.Contains(r.stderr, "not pinned") {
		t.Fatalf("%s", r)
	}
	seen := guest.mounted(dir)
	seen.equals(want)
	seen.waitState("hydrated", time.Minute)
	seen.unmount()
	sameBytes(t, "the export", guest.exported(shared), want)
	if info := guest.show(shared); info.State != "completed" {
		t.Errorf("show: %+v", info)
	}
	home := newDirStore(t)
	copied := guest.ok("snapshot", "copy", shared, "--to", home.url)
	sameBytes(t, "the copy", newHost(t, home).exported(copied), want)

	for _, snap := range []string{later, stranger} {
		guest.fails(1, []string{"denied"}, "mount", snap, t.TempDir())
	}
	for what, args := range map[string][]string{
		"list":   {"snapshot", "list"},
		"delete": {"snapshot", "delete", shared},
		"tag":    {"snapshot", "tag", shared, "a=b"},
		"lock":   {"snapshot", "lock", shared, "--mode", "governance", "--days", "1"},
		"share":  {"snapshot", "share", shared, "--add", "friend"},
		"volume": {"volume", "create", "--snapshot", shared},
	} {
		t.Run(what, func(t *testing.T) { guest.in(t).fails(1, []string{"denied"}, args...) })
	}
	guestSees(t, s, access, secret, shared, later, stranger)

	// The owner may delete it at any time: reads fail, and bring nothing wrong.
	visitor := newHost(t, s) // which has nothing in its cache
	visitor.env = guest.env
	seen = visitor.mount(shared, "--no-hydrate")
	if !bytes.Equal(seen.read(5*mib, 4096), want[5*mib:5*mib+4096]) {
		t.Error("the page read before the delete is wrong")
	}
	m.unmount()
	h.ok("volume", "delete", vol)
	h.ok("snapshot", "delete", shared, later)
	if _, err := seen.open(os.O_RDONLY).ReadAt(make([]byte, 4096), 30*mib); !errors.Is(err, syscall.EIO) {
		t.Errorf("a cold read of what is gone: %v, want EIO", err)
	}
	if !bytes.Equal(seen.read(5*mib, 4096), want[5*mib:5*mib+4096]) {
		t.Error("the page read before the delete is wrong after it")
	}
	seen.unmount()
	guest.fails(3, []string{"InvalidSnapshot.NotFound"}, "mount", shared, t.TempDir())
}

// guestSees checks object by object what a guest may do: read, of the objects of
// the store, exactly those that the shared snapshot needs.
func guestSees(t *testing.T, s *store, access, secret, shared string, others ...string) {
	t.Helper()
	lineage := shared[:len("snap-12345678")]
	packs := 0
	for key := range s.objects(t, "") {
		read, write, remove := s.server.May(t, s.bucket, "some/prefix", key, access, secret)
		about := func(snap string) bool { return strings.Contains(key, snap) }
		record := key == "store.json" || key == "lineages/"+strings.TrimPrefix(lineage, "snap-")
		switch {
		case read && (slices.ContainsFunc(others, about) || !record && !about(lineage)):
			t.Errorf("the guest reads %s", key)
		case !read && (record || about(shared) && !strings.HasPrefix(key, "pins/")):
			t.Errorf("the guest cannot read %s", key)
		case read && strings.Contains(key, "/packs/"):
			packs++
		}
		if write || remove {
			t.Errorf("the guest writes %v, removes %v: %s", write, remove, key)
		}
	}
	if packs < 3 {
		t.Errorf("the guest reads %d packs", packs)
	}
}

func TestInitSaysThatABucketIsVersioned(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t, "--versioning-dir", t.TempDir())
	plain, versioned := server.NewBucket(t), server.NewBucket(t)
	server.SetVersioned(t, versioned)
	for bucket, want := range map[string]bool{plain: false, versioned: true} {
		h := newHost(t, &store{url: server.URL(bucket, "p"), env: server.Env()})
		r := h.run("init")
		if strings.Contains(r.stderr, "is versioned") != want {
			t.Errorf("versioned: %v: %s", want, r)
		}
		// This server answers a put with If-Match of what was deleted from a
		// versioned bucket as if it was there, which init finds out.
		if r.code != 0 && !(want && strings.Contains(r.stderr, "ignores If-Match")) {
			t.Errorf("%s", r)
		}
	}
}
