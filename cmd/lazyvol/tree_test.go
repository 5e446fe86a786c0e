package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func treeID(lineage manifest.LineageID, serial uint64) manifest.SnapshotID {
	return manifest.SnapshotID{Lineage: lineage, Serial: serial}
}

// made describes a completed snapshot that was made from another of its lineage; 0
// is none.
func made(lineage manifest.LineageID, serial, parent uint64) snapshot.Description {
	d := snapshot.Description{
		ID: treeID(lineage, serial), State: snapshot.Completed, Start: time.Date(2026, 11, int(serial%28)+1, 12, 0, 0, 0, time.Local),
		Geometry: manifest.Geometry{Size: 10 << 30, BlockSize: 1 << 19}, Outcome: manifest.Outcome{StoredBytes: 3 << 20},
	}
	if parent != 0 {
		d.Parent = treeID(lineage, parent)
	}
	return d
}

func drawn(t testing.TB, trees []*lineageTree, frees map[manifest.SnapshotID]freed) string {
	t.Helper()
	var out strings.Builder
	if err := drawTrees(&out, trees, frees); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestTreeShowsWhatWasMadeFromWhat(t *testing.T) {
	found := []snapshot.Description{made(1, 1, 0), made(1, 2, 1), made(2, 1, 0), made(1, 3, 2), made(1, 4, 2), made(1, 5, 3), made(1, 8, 7), made(1, 9, 6)}
	found[0].Description, found[0].Tags = "first", map[string]string{"Name": "nightly"}
	found[1].Description = "two\nlines \x1b[31m"
	found[2].Encryption = &manifest.Encryption{KeyURI: "file:///key"}
	found[4].State, found[4].Percent, found[4].Outcome = snapshot.Pending, 40, manifest.Outcome{}
	binned := map[manifest.SnapshotID]manifest.SnapshotID{treeID(1, 7): treeID(1, 1)} // 6 is gone for good
	frees := map[manifest.SnapshotID]freed{treeID(1, 1): {bytes: 1 << 20}, treeID(1, 3): {unknown: "frees ?"}}
	want := strings.TrimPrefix(`
lineage 00000001, not encrypted
├─ snap-00000001000000001              2026-11-02 12:00:00  10 GiB  stored 3.0 MiB  frees 1.0 MiB  nightly
│  ├─ snap-00000001000000002           2026-11-03 12:00:00  10 GiB  stored 3.0 MiB                 two lines  [31m
│  │  ├─ snap-00000001000000003        2026-11-04 12:00:00  10 GiB  stored 3.0 MiB  frees ?
│  │  │  ↓ snap-00000001000000005      2026-11-06 12:00:00  10 GiB  stored 3.0 MiB
│  │  └─ snap-00000001000000004 pending 40%  2026-11-05 12:00:00  10 GiB  stored 0 B
│  └─ snap-00000001000000008           2026-11-09 12:00:00  10 GiB  stored 3.0 MiB                 (parent snap-00000001000000007 is not listed)
└─ snap-00000001000000009              2026-11-10 12:00:00  10 GiB  stored 3.0 MiB                 (parent snap-00000001000000006 is not listed)
lineage 00000002, encrypted
└─ snap-00000002000000001              2026-11-02 12:00:00  10 GiB  stored 3.0 MiB
`, "\n")
	if diff := cmp.Diff(squeezed(want), squeezed(drawn(t, growTrees(found, binned), frees))); diff != "" {
		t.Errorf("the tree (-want +got):\n%s", diff)
	}
}

func TestTreeForProgramsHasTheOrderOfTheTree(t *testing.T) {
	found := []snapshot.Description{made(1, 1, 0), made(1, 2, 1), made(2, 1, 0), made(1, 3, 1), made(1, 4, 2), made(1, 9, 6)}
	found[2].Encryption = &manifest.Encryption{KeyURI: "file:///key"}
	frees := map[manifest.SnapshotID]freed{treeID(1, 2): {bytes: 7}, treeID(1, 3): {unknown: "frees ?"}}
	var got []string
	for _, l := range describeTrees(growTrees(found, nil), frees).Lineages {
		got = append(got, fmt.Sprintf("%s %t", l.LineageId, l.Encrypted))
		for _, b := range l.Snapshots {
			line := b.SnapshotId + " below " + b.Below
			if b.UniqueBytes != nil {
				line += fmt.Sprint(" frees ", *b.UniqueBytes)
			}
			got = append(got, line)
		}
	}
	id := func(serial uint64) string { return treeID(1, serial).String() }
	want := []string{
		"00000001 false", id(1) + " below ", id(2) + " below " + id(1) + " frees 7", id(4) + " below " + id(2), id(3) + " below " + id(1), id(9) + " below ",
		"00000002 true", treeID(2, 1).String() + " below ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// squeezed returns lines without the alignment of what follows the id.
func squeezed(s string) []string {
	var lines []string
	for line := range strings.Lines(s) {
		at := max(strings.Index(line, "snap-"), 0)
		lines = append(lines, line[:at]+strings.Join(strings.Fields(line[at:]), " "))
	}
	return lines
}

func TestTreeOfAChainStaysNarrow(t *testing.T) {
	var found []snapshot.Description
	for n := range uint64(500) {
		found = append(found, made(1, n+1, n))
	}
	for line := range strings.Lines(drawn(t, growTrees(found, nil), nil)) {
		if len([]rune(line)) > 100 {
			t.Fatalf("a line of %d characters: %s", len([]rune(line)), line)
		}
	}
}

// Whatever parents the records tell of, circles among them, each snapshot is drawn
// once, below its parent if that is listed and there is no circle.
func TestTreeLeavesNoSnapshotOut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 12).Draw(t, "snapshots")
		var found []snapshot.Description
		binned := make(map[manifest.SnapshotID]manifest.SnapshotID)
		sound := rapid.Bool().Draw(t, "sound")
		lineages := rapid.Map(rapid.Uint32Range(1, 2), func(n uint32) manifest.LineageID { return manifest.LineageID(n) })
		for i := range n {
			d := made(lineages.Draw(t, "lineage"), uint64(i+1), 0)
			switch {
			case !sound:
				d.Parent = treeID(lineages.Draw(t, "lineage of the parent"), rapid.Uint64Range(1, 14).Draw(t, "parent"))
			case i > 0:
				d.Parent = treeID(d.ID.Lineage, rapid.Uint64Range(uint64(max(i-2, 0)), uint64(i)).Draw(t, "parent"))
			}
			if d.Parent.Serial == 0 {
				d.Parent = manifest.SnapshotID{}
			}
			if rapid.Bool().Draw(t, "deleted") {
				binned[d.ID] = d.Parent
			} else {
				found = append(found, d)
			}
		}
		var out strings.Builder
		trees := growTrees(found, binned)
		if err := drawTrees(&out, trees, nil); err != nil {
			t.Fatal(err)
		}
		lines := make(map[string]int)
		for line := range strings.Lines(out.String()) {
			if _, rest, ok := strings.Cut(line, "snap-"); ok {
				id, _, _ := strings.Cut(rest, " ")
				lines["snap-"+id]++
			}
		}
		listed := make(map[manifest.SnapshotID]bool)
		for _, d := range found {
			listed[d.ID] = true
			if lines[d.ID.String()] != 1 {
				t.Fatalf("%s is drawn %d times in\n%s", d.ID, lines[d.ID.String()], &out)
			}
		}
		if len(lines) != len(found) {
			t.Fatalf("%d snapshots are drawn, want %d", len(lines), len(found))
		}
		var check func(parent *treeNode, nodes []*treeNode)
		check = func(parent *treeNode, nodes []*treeNode) {
			for _, n := range nodes {
				want := n.Parent
				for sound && !want.IsZero() && !listed[want] {
					want = binned[want]
				}
				var got manifest.SnapshotID
				if parent != nil {
					got = parent.ID
				}
				if sound && got != want || parent != nil && got.Lineage != n.ID.Lineage {
					t.Fatalf("%s hangs from %s, want %s", n.ID, got, want)
				}
				check(n, n.children)
			}
		}
		for _, tree := range trees {
			check(nil, tree.roots)
		}
	})
}

func TestDiffForPeopleEndsWithTheShareOfTheDevice(t *testing.T) {
	const gib = 1 << 30
	for _, test := range []struct {
		changes []snapshot.Change
		device  int64
		want    string
	}{
		{nil, 10 * gib, "0 ranges, 0 B of 10 GiB: 0.00% of the device\n"},
		{[]snapshot.Change{{Offset: 512 << 10, Length: 1 << 20, First: true, Second: true}}, 4 << 20, "" +
			"          OFFSET          AT        SIZE  CHANGE\n" +
			"          524288     512 KiB     1.0 MiB  changed\n1 range, 1.0 MiB of 4.0 MiB: 25.00% of the device\n"},
		{[]snapshot.Change{{Offset: 0, Length: 4096, Second: true}, {Offset: 9 * gib, Length: 4096, First: true}}, 10 * gib, "" +
			"          OFFSET          AT        SIZE  CHANGE\n" +
			"               0         0 B     4.0 KiB  added\n" +
			"      9663676416     9.0 GiB     4.0 KiB  zeroed\n2 ranges, 8.0 KiB of 10 GiB: less than 0.01% of the device\n"},
	} {
		t.Run(fmt.Sprint(len(test.changes)), func(t *testing.T) {
			var out strings.Builder
			sum := diffSum{out: &out, device: test.device}
			for _, c := range test.changes {
				if err := sum.add(c); err != nil {
					t.Fatal(err)
				}
			}
			if err := sum.end(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, out.String()); diff != "" {
				t.Errorf("printed (-want +got):\n%s", diff)
			}
		})
	}
}
