package manifest_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

// in returns a ref of 100 bytes at an offset of a pack.
func in(pack, offset uint32) manifest.Ref {
	return manifest.Ref{Owner: 1, Pack: pack, Offset: offset, Length: 100}
}

func TestGroupRuns(t *testing.T) {
	for name, test := range map[string]struct {
		refs []manifest.Ref
		want [][]int64 // blocks of each run
	}{
		"nothing":                    {nil, nil},
		"only holes":                 {[]manifest.Ref{{}, {}}, nil},
		"neighbours":                 {[]manifest.Ref{in(1, 0), in(1, 100), in(1, 200)}, [][]int64{{0, 1, 2}}},
		"holes in between":           {[]manifest.Ref{in(1, 0), {}, in(1, 100)}, [][]int64{{0, 2}}},
		"a gap that is bridged":      {[]manifest.Ref{in(1, 0), in(1, 150)}, [][]int64{{0, 1}}},
		"a gap too wide":             {[]manifest.Ref{in(1, 0), in(1, 151)}, [][]int64{{0}, {1}}},
		"two packs interleaved":      {[]manifest.Ref{in(1, 0), in(2, 0), in(1, 100), in(2, 100)}, [][]int64{{0, 2}, {1, 3}}},
		"a span too long":            {[]manifest.Ref{in(1, 0), in(1, 100), in(1, 200), in(1, 300)}, [][]int64{{0, 1, 2}, {3}}},
		"the same bytes twice":       {[]manifest.Ref{in(1, 0), in(1, 0)}, [][]int64{{0}, {1}}},
		"descending":                 {[]manifest.Ref{in(1, 100), in(1, 0)}, [][]int64{{0}, {1}}},
		"overlapping":                {[]manifest.Ref{in(1, 0), in(1, 99)}, [][]int64{{0}, {1}}},
		"packs of the same number":   {[]manifest.Ref{in(1, 0), {Owner: 2, Pack: 1, Offset: 100, Length: 100}}, [][]int64{{0}, {1}}},
		"a block longer than a span": {[]manifest.Ref{{Owner: 1, Offset: 0, Length: 5000}}, [][]int64{{0}}},
	} {
		var blocks []int64
		for i := range test.refs {
			blocks = append(blocks, int64(i))
		}
		var got [][]int64
		for _, run := range manifest.GroupRuns(blocks, test.refs, 50, 300) {
			got = append(got, run.Blocks)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestRunsHoldEveryDataBlockOnceWithinBounds(t *testing.T) {
	const maxGap, maxSpan = 1 << 20, 8 << 20
	rapid.Check(t, func(t *rapid.T) {
		all := rapid.SliceOfN(refs, 0, 50).Draw(t, "refs")
		for i := range all {
			if !all[i].IsHole() { // few packs, so that there is something to group
				all[i].Owner, all[i].Pack = 1, all[i].Pack%3
			}
		}
		blocks := make([]int64, len(all))
		want := make(map[int64]manifest.Ref)
		for i, ref := range all {
			blocks[i] = 10 * int64(i)
			if !ref.IsHole() {
				want[blocks[i]] = ref
			}
		}
		got := make(map[int64]manifest.Ref)
		firstBlock := int64(-1)
		for _, run := range manifest.GroupRuns(blocks, all, maxGap, maxSpan) {
			if run.Blocks[0] <= firstBlock {
				t.Fatalf("run of block %d after that of block %d", run.Blocks[0], firstBlock)
			}
			firstBlock = run.Blocks[0]
			off, n := run.Span()
			if len(run.Blocks) > 1 && n > maxSpan {
				t.Fatalf("span of %d bytes", n)
			}
			for i, ref := range run.Refs {
				if int64(ref.Offset) < off || int64(ref.Offset)+int64(ref.Length) > off+n || ref.Pack != run.Refs[0].Pack {
					t.Fatalf("%+v in a run of pack %d over [%d, +%d)", ref, run.Refs[0].Pack, off, n)
				}
				if i > 0 && (run.Blocks[i] <= run.Blocks[i-1] || ref.Offset < run.Refs[i-1].Offset) {
					t.Fatalf("run is out of order: %+v", run)
				}
				got[run.Blocks[i]] = ref
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	})
}
