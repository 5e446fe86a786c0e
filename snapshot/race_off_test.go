//go:build !race

package snapshot_test

// How much the tests of schedules explore: all of what their scenarios ask for,
// and so many schedules at random.
const (
	thinner     = 0
	randomSeeds = 200
)
