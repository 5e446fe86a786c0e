package hydrate

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestAgendaLosesNoLeafAndPlansNoneTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(0, 3*maxListed).Draw(t, "leaves")
		stride := rapid.Int64Range(1, 5000).Draw(t, "stride")
		a := noLeaf()
		leaves := make([]int64, n)
		for i := range leaves {
			leaves[i] = int64(i) * stride % 5000
			a.add(leaves[i])
		}
		if len(a.listed) > maxListed {
			t.Fatalf("%d leaves are listed", len(a.listed))
		}
		var planned []int64
		for !a.empty() {
			leaf := a.first()
			planned = append(planned, leaf)
			if leaf == 5001 {
				a.strike(noRest)
			} else {
				a.strike(leaf + 1)
			}
		}
		if !slices.IsSorted(planned) || len(slices.Compact(slices.Clone(planned))) != len(planned) {
			t.Fatal("leaves are planned twice or out of order")
		}
		for _, leaf := range leaves {
			if _, ok := slices.BinarySearch(planned, leaf); !ok {
				t.Fatalf("leaf %d is lost", leaf)
			}
		}
	})
}
