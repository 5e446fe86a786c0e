package snapshot

import "time"

// now is the time put into records for people to read. Nothing is decided by
// it.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }
