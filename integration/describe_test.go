package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// clone makes another object of a store on S3: a copy, with the server's own notes,
// that is then edited.
func (s *store) clone(t testing.TB, from, to string, change func(record map[string]any)) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.files, from))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.files, to)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	names := make([]byte, 4096)
	n, err := unix.Listxattr(filepath.Join(s.files, from), names)
	if err != nil {
		t.Fatal(err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 4096)
		n, err := unix.Getxattr(filepath.Join(s.files, from), name, value)
		if err == nil {
			err = unix.Setxattr(path, name, value[:n], 0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s.edit(t, to, change)
}

// A thousand snapshots of a store that is 20 ms away are listed in two seconds:
// what this host has read before it does not ask for again.
func TestThousandSnapshotsAreListedInTwoSeconds(t *testing.T) {
	t.Parallel()
	near := newS3Store(t)
	near.damaged() // the others have no data
	other := newHost(t, near)
	snap := other.ok("snapshot", "create", "--tag=n=first", other.image(randomBytes(1, mib)))
	gone := other.ok("snapshot", "create", other.image(randomBytes(2, mib)))
	for n := range 998 {
		id := fmt.Sprintf("%s%09x", snap[:len(snap)-9], n+1)
		for _, kind := range []string{"intents", "outcomes"} {
			near.clone(t, filepath.Join(kind, snap), filepath.Join(kind, id), func(record map[string]any) { record["snapshot"] = id })
		}
	}
	far, network := near.behindNetwork(t)
	network.Suffer(t, toxic("latency", "downstream", "latency", 20))
	h := newHost(t, far)
	timed := func(want int) time.Duration {
		t.Helper()
		start := time.Now()
		if got := len(h.list()); got != want {
			t.Fatalf("%d snapshots are listed, want %d", got, want)
		}
		return time.Since(start)
	}
	cold, warm := timed(1000), timed(1000)
	t.Logf("a thousand snapshots at +20 ms: %s, and again: %s", cold.Round(time.Millisecond), warm.Round(time.Millisecond))
	if warm > 2*time.Second {
		t.Errorf("the second list took %s", warm)
	}

	// What others do meanwhile is seen.
	other.ok("snapshot", "tag", snap, "n=second")
	other.ok("snapshot", "delete", gone)
	second := other.ok("snapshot", "create", other.image(randomBytes(3, mib)))
	listed := make(map[string]snapshotInfo)
	for _, s := range h.list() {
		listed[s.SnapshotId] = s
	}
	if _, deleted := listed[gone]; deleted || len(listed) != 1000 || listed[second].State != "completed" || listed[snap].Tags[0].Value != "second" {
		t.Errorf("%d are listed; of the deleted one %t, of the new one %q, of the tagged one %v", len(listed), deleted, listed[second].State, listed[snap].Tags)
	}

	// A cache that is damaged is none.
	for _, file := range glob(t, filepath.Join(h.state, "records", "*")) {
		if err := os.WriteFile(file, []byte("lazyvol records 1\nnothing of use\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	timed(1000)
}

// failure is an error as scripts read it.
type failure struct {
	Error struct{ Code, Reason, Message string }
}

// refused runs lazyvol with --json, which must fail with an exit code and a code of
// EBS, and say the same in plain text without it.
func (h *host) refused(exit int, code string, args ...string) {
	h.t.Helper()
	r := h.run(append(args, "--json")...)
	lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
	got := parse[failure](h.t, lines[len(lines)-1]).Error
	if r.code != exit || got.Code != code || got.Message == "" || r.stdout != "" {
		h.t.Errorf("%s\nwant exit %d with code %s", r, exit, code)
	}
	h.fails(exit, []string{code, got.Reason}, args...)
}

func TestRefusalsCarryTheCodesOfEBS(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	image := h.image(randomBytes(1, mib))
	one := h.ok("snapshot", "create", image)
	two := h.ok("snapshot", "create", image)
	before := h.ok("snapshot", "show", "--json", one)
	unknown, vol := "snap-00000001000000001", "vol-00000000000000001"
	h.refused(3, "InvalidSnapshot.NotFound", "snapshot", "show", unknown)
	h.refused(3, "InvalidSnapshot.NotFound", "snapshot", "delete", unknown)
	h.refused(3, "InvalidSnapshot.NotFound", "snapshot", "diff", one, unknown)
	h.refused(3, "InvalidVolume.NotFound", "volume", "show", vol)
	h.refused(2, "InvalidSnapshotID.Malformed", "snapshot", "show", "snap-1")
	h.refused(2, "InvalidVolumeID.Malformed", "volume", "show", "vol-1")
	h.refused(4, "ValidationException", "snapshot", "diff", one, two)
	h.refused(2, "InvalidParameterValue", "snapshot", "tag", one, "aws:a=b")
	h.refused(2, "InvalidParameterValue", "snapshot", "tag", one, "lazyvol:a=b")
	h.refused(2, "InvalidParameterCombination", "snapshot", "tag", one, "a=b", "--remove=a")
	h.refused(2, "InvalidParameterValue", "snapshot", "create", image, "--description", strings.Repeat("ü", 256))
	h.refused(2, "InvalidParameterValue", "snapshot", "list", "--owner", "no owner")
	var tags []string
	for n := range 50 {
		tags = append(tags, fmt.Sprintf("key-%02d=%s", n, strings.Repeat("ü", 256)))
	}
	h.refused(4, "TagLimitExceeded", slices.Concat([]string{"snapshot", "tag", one}, tags, []string{"one-more="})...)
	if now := h.ok("snapshot", "show", "--json", one); now != before {
		t.Errorf("the refusals changed %s to %s", before, now)
	}
	h.ok(slices.Concat([]string{"snapshot", "tag", one}, tags)...)
	h.refused(4, "TagLimitExceeded", "snapshot", "tag", one, "one-more=")
	h.ok("snapshot", "tag", one, "one-more=", "--remove", "key-00", "--remove", "never-there")
	if n := len(h.show(one).Tags); n != 50 {
		t.Errorf("%d tags are left", n)
	}
	if pins := h.store.objects(t, "pins"); len(pins) != 0 {
		t.Errorf("the refusals left pins: %v", pins)
	}
}

// What EBS's DescribeSnapshots says of a snapshot that has no key, and whose it is.
func TestShowHasTheFieldsOfDescribeSnapshots(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	image := h.image(randomBytes(1, mib))
	plain := h.ok("snapshot", "create", image, "--description", strings.Repeat("ü", 255))
	owned := h.ok("snapshot", "create", image, "--owner-id=team-a")
	storeID := parse[map[string]any](t, string(h.store.object(t, "store.json").was))["id"]
	for snap, owner := range map[string]any{plain: storeID, owned: "team-a"} {
		j := parse[map[string]any](t, h.ok("snapshot", "show", "--json", snap))
		for name, want := range map[string]any{
			"SnapshotId": snap, "OwnerId": owner, "State": "completed", "Progress": "100%", "StorageTier": "standard", "Encrypted": false,
			"VolumeId": "vol-ffffffff", "VolumeSize": 1.0, "FullSnapshotSizeInBytes": float64(mib),
		} {
			if j[name] != want {
				t.Errorf("%s of %s is %v, want %v", name, snap, j[name], want)
			}
		}
		for _, name := range []string{"KmsKeyId", "DataEncryptionKeyId", "StateMessage", "TransferType", "ParentSnapshotId"} {
			if value, there := j[name]; there {
				t.Errorf("%s is %v, and means nothing here", name, value)
			}
		}
		for name, value := range map[string]any{"StartTime": j["StartTime"], "CompletionTime": j["CompletionTime"]} {
			if _, err := time.Parse(time.RFC3339, fmt.Sprint(value)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	for _, c := range []struct {
		flags []string
		want  []string
	}{
		{[]string{"--owner=self"}, []string{plain}},
		{[]string{"--owner=team-a"}, []string{owned}},
		{[]string{"--owner=self", "--owner-id=team-a"}, []string{owned}},
		{[]string{"--owner=self", "--owner=team-a"}, []string{plain, owned}},
		{[]string{"--owner=team-b"}, nil},
		{[]string{"--filter=owner-id=team-*", "--filter=encrypted=false"}, []string{owned}},
		{[]string{"--filter=encrypted=true"}, nil},
		{[]string{"--filter=transfer-type=standard"}, nil},
	} {
		var got []string
		for _, s := range h.list(c.flags...) {
			got = append(got, s.SnapshotId)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q lists %v, want %v", c.flags, got, c.want)
		}
	}
}

func TestListShowsWhatIsNotDamaged(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	h.store.damaged()
	image := h.image(randomBytes(1, mib))
	good, bad, orphan := h.ok("snapshot", "create", image), h.ok("snapshot", "create", image), h.ok("snapshot", "create", image)
	h.store.object(t, "outcomes", bad).cut(100)
	h.store.object(t, "lineages", orphan[len("snap-"):len("snap-")+8]).hide()
	for range 2 { // the second time with a cache
		r := h.run("snapshot", "list", "--json")
		listed := parse[struct{ Snapshots []snapshotInfo }](t, r.stdout).Snapshots
		got := parse[failure](t, r.stderr).Error
		if r.code != 1 || len(listed) != 1 || listed[0].SnapshotId != good || !strings.Contains(got.Message, bad) || !strings.Contains(got.Message, orphan) {
			t.Errorf("%s\nwant %s alone, and the others named", r, good)
		}
	}
	h.fails(1, []string{bad}, "snapshot", "show", bad)
	h.fails(1, []string{orphan[len("snap-") : len("snap-")+8]}, "snapshot", "show", orphan)
}

// The JSON of a diff is EBS's, one changed block on a line, a token where there is
// data.
func TestDiffPrintsChangedBlocks(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--size", "1GiB")
	m := h.mount(vol)
	m.write(randomBytes(1, blockBytes), 0)
	m.write(randomBytes(2, blockBytes), 3*blockBytes)
	first := h.ok("snapshot", "create", vol)
	m.write(make([]byte, blockBytes), 3*blockBytes) // a hole
	m.write(randomBytes(3, 4096), 0)
	m.write(randomBytes(4, 4096), 1500*blockBytes)
	second := h.ok("snapshot", "create", vol)
	out := h.ok("snapshot", "diff", "--json", first, second)
	if lines := strings.Count(out, "\n"); lines != 4 {
		t.Errorf("%d lines: %s", lines+1, out)
	}
	type list struct {
		VolumeSize    int
		BlockSize     int
		ChangedBlocks []map[string]any
	}
	got := parse[list](t, out)
	if got.VolumeSize != 1 || got.BlockSize != blockBytes || len(got.ChangedBlocks) != 3 {
		t.Fatalf("got %s", out)
	}
	for i, want := range []struct {
		block float64
		keys  []string
	}{{0, []string{"BlockIndex", "FirstBlockToken", "SecondBlockToken"}}, {3, []string{"BlockIndex", "FirstBlockToken"}}, {1500, []string{"BlockIndex", "SecondBlockToken"}}} {
		b := got.ChangedBlocks[i]
		if keys := slices.Sorted(maps.Keys(b)); b["BlockIndex"] != want.block || !slices.Equal(keys, want.keys) {
			t.Errorf("change %d is %v, want block %v with %v", i, b, want.block, want.keys)
		}
	}
	if same := h.ok("snapshot", "diff", "--json", first, first); !json.Valid([]byte(same)) || len(parse[list](t, same).ChangedBlocks) != 0 {
		t.Errorf("of a snapshot and itself: %s", same)
	}
	if text, want := h.ok("snapshot", "diff", first, second), fmt.Sprintf("0 %d\n%d %d\n%d %d", blockBytes, 3*blockBytes, blockBytes, 1500*blockBytes, blockBytes); text != want {
		t.Errorf("printed %q, want %q", text, want)
	}
}
