package manifest

import (
	"cmp"
	"time"
)

// What a [Policy] says of snapshots that are shared with everybody, as EBS names it.
const (
	PublicUnblocked = "unblocked"
	PublicBlockNew  = "block-new-sharing" // no more may be
	PublicBlockAll  = "block-all-sharing" // and those that are count as if they were not
)

const (
	// MaxRetention bounds how long a deleted snapshot can be brought back: EBS's year.
	MaxRetention = 365 * day

	// maxRetainRules bounds the rules of a policy.
	maxRetainRules = 1000
)

// A Policy is what holds for all snapshots of a store. It is replaced by compare-and-swap; while
// there is none, the zero one holds.
type Policy struct {
	Version      int          `json:"version"`
	Retain       []RetainRule `json:"retain,omitempty"`       // of several that fit a snapshot, the longest
	PublicAccess string       `json:"publicAccess,omitempty"` // one of those above; "" is PublicUnblocked
}

// A RetainRule says for how long deleted snapshots can be brought back.
type RetainRule struct {
	Tag     string `json:"tag,omitempty"`   // of the snapshots that have it; "": of all
	Value   string `json:"value,omitempty"` // of that tag; "": any
	Seconds int64  `json:"seconds"`         // at most MaxRetention
}

// Retention returns for how long a deleted snapshot with these tags can be brought back; 0: not at
// all.
func (p Policy) Retention(tags map[string]string) time.Duration {
	longest := int64(0)
	for _, r := range p.Retain {
		value, tagged := tags[r.Tag]
		if r.Tag == "" || tagged && (r.Value == "" || r.Value == value) {
			longest = max(longest, r.Seconds)
		}
	}
	return time.Duration(longest) * time.Second
}

// Public returns what holds of snapshots that are shared with everybody.
func (p Policy) Public() string { return cmp.Or(p.PublicAccess, PublicUnblocked) }

func (p Policy) version() int { return p.Version }

func (p Policy) validate() error {
	err := cmp.Or(
		check(len(p.Retain) <= maxRetainRules, "number of retention rules", len(p.Retain)),
		check(p.Public() == PublicUnblocked || p.Public() == PublicBlockNew || p.Public() == PublicBlockAll, "public access", p.PublicAccess),
	)
	for _, r := range p.Retain {
		err = cmp.Or(err,
			check(r.Seconds > 0 && r.Seconds <= int64(MaxRetention/time.Second), "seconds to retain", r.Seconds),
			check(r.Tag != "" || r.Value == "", "tag to retain", r.Tag),
			check(validText(r.Tag, MaxTagKeyLength) && validText(r.Value, MaxTagValueLength), "tag to retain", r.Tag),
		)
	}
	return err
}
