package snapshot

import "context"

// CheckInWindows checks a whole store with windows of so many leaves of all roots
// together.
func CheckInWindows(ctx context.Context, s *Store, window int) (*Report, error) {
	c := &checker{at: s, Check: Check{Share: 1}, report: &Report{}, reads: make(places, packReads), window: window}
	err := c.all(ctx)
	c.finish()
	return c.report, err
}
