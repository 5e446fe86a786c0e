package hydrate

import (
	"math"
	"slices"
)

// maxListed bounds the memory of an agenda.
const maxListed = 1024

// An agenda is a set of leaves to plan, in bounded memory: some, ascending, and
// all from rest on. Every leaf listed is below rest.
type agenda struct {
	listed []int64
	rest   int64
}

const noRest = math.MaxInt64

func everyLeaf() agenda { return agenda{rest: 0} }
func noLeaf() agenda    { return agenda{rest: noRest} }

func (a *agenda) empty() bool { return len(a.listed) == 0 && a.rest == noRest }

// add puts leaf on the agenda; when that makes the list too long, everything
// from its last leaf on becomes the rest.
func (a *agenda) add(leaf int64) {
	i, found := slices.BinarySearch(a.listed, leaf)
	if found || leaf >= a.rest {
		return
	}
	a.listed = slices.Insert(a.listed, i, leaf)
	if len(a.listed) > maxListed {
		a.rest = a.listed[maxListed]
		a.listed = a.listed[:maxListed]
	}
}

// first returns the leaf to plan next. The agenda must not be empty.
func (a *agenda) first() int64 {
	if len(a.listed) > 0 {
		return a.listed[0]
	}
	return a.rest
}

// strike takes the first leaf off; next is the leaf that comes after it.
func (a *agenda) strike(next int64) {
	if len(a.listed) > 0 {
		a.listed = a.listed[1:]
		return
	}
	a.rest = next
}
