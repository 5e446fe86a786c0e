//go:build race

package snapshot_test

// With the race detector, which slows them down ten times, the tests of
// schedules explore less: so many switches less, and so many at random.
const (
	thinner     = 1
	randomSeeds = 15
)
