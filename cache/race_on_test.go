//go:build race

package cache

// racing: the race detector is on, under which a sync.Pool forgets at random.
const racing = true
