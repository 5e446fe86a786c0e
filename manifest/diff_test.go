package manifest_test

import (
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

func TestDiffLeavesIsWhatAMapSays(t *testing.T) {
	leaves := rapid.MapOf(rapid.Int64Range(0, 12), rapid.SampledFrom([]string{"a", "b"}))
	root := func(m map[int64]string) *manifest.Root {
		r := &manifest.Root{}
		for _, leaf := range slices.Sorted(maps.Keys(m)) {
			r.Leaves = append(r.Leaves, manifest.LeafRef{Leaf: leaf, Hash: manifest.Sum([]byte(m[leaf]))})
		}
		return r
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := leaves.Draw(t, "a"), leaves.Draw(t, "b")
		var want []int64
		for leaf := range int64(13) {
			if a[leaf] != b[leaf] {
				want = append(want, leaf)
			}
		}
		got := slices.Collect(manifest.DiffLeaves(root(a), root(b)))
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestDiffBlocksComparesContent(t *testing.T) {
	a, b := manifest.NewLeaf(4), manifest.NewLeaf(6)
	ref := testRef()
	moved := ref
	moved.Pack++
	other := ref
	other.Hash = manifest.Sum([]byte("other"))
	a.Set(0, ref)
	b.Set(0, moved) // the same content elsewhere
	a.Set(1, ref)
	b.Set(1, other)
	a.Set(2, ref) // and a hole in b
	b.Set(5, ref) // beyond a
	for name, test := range map[string]struct {
		a, b *manifest.Leaf
		want []int
	}{
		"both":    {a, b, []int{1, 2, 5}},
		"swapped": {b, a, []int{1, 2, 5}},
		"no a":    {nil, b, []int{0, 1, 5}},
		"no b":    {a, nil, []int{0, 1, 2}},
		"same":    {a, a.Clone(), nil},
		"neither": {nil, nil, nil},
	} {
		if diff := cmp.Diff(test.want, slices.Collect(manifest.DiffBlocks(test.a, test.b))); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestDiffsStopWhenAsked(t *testing.T) {
	a := testRoot()
	for range manifest.DiffLeaves(a, &manifest.Root{}) {
		break
	}
	leaf := manifest.NewLeaf(3)
	leaf.Set(0, testRef())
	leaf.Set(1, testRef())
	n := 0
	for range manifest.DiffBlocks(leaf, nil) {
		n++
		break
	}
	if n != 1 {
		t.Errorf("%d blocks differ", n)
	}
}
