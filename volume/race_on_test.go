//go:build race

package volume

// thinning is by how much the tests that go through many cases, one after the
// other, are thinned out by default: the race detector slows them down fifteen
// times, and has nothing to find in them.
const thinning = 12
