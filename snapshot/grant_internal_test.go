package snapshot

import (
	"fmt"
	"path"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A cover fits every key that is wanted and no other, and is no longer than the
// list of those.
func TestCoverIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var keys []string
		wanted := make(map[string]bool)
		share := rapid.IntRange(0, 10).Draw(t, "share")
		for n := range rapid.IntRange(0, 400).Draw(t, "packs") {
			keys = append(keys, fmt.Sprintf("data/snap-0/packs/%08d", n))
		}
		keys = append(keys, "data/snap-0/leaves/00000000", "data/snap-0/root")
		slices.Sort(keys)
		for i, key := range keys {
			// In runs, as writes make them.
			wanted[key] = (i/rapid.IntRange(1, 50).Draw(t, "run"))%10 < share
		}
		patterns := cover(keys, func(key string) bool { return wanted[key] })
		all := 0
		for _, key := range keys {
			fits := slices.ContainsFunc(patterns, func(p string) bool {
				if len(p) > 0 && p[len(p)-1] == '*' {
					return len(key) >= len(p)-1 && key[:len(p)-1] == p[:len(p)-1]
				}
				return p == key
			})
			if fits != wanted[key] {
				t.Fatalf("%s: fits %v, wanted %v: %v", path.Base(key), fits, wanted[key], patterns)
			}
			if wanted[key] {
				all++
			}
		}
		if len(patterns) > all {
			t.Fatalf("%d patterns for %d keys", len(patterns), all)
		}
		if all == len(keys) && len(patterns) != 1 {
			t.Fatalf("all keys are wanted, and there are %d patterns", len(patterns))
		}
	})
}
