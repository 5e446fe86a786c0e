package manifest

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// KindSets are the outcomes of sets.
const KindSets = "sets"

const setPrefix = "set-"

// MaxSetMembers is how many snapshots a set may have: as many as EBS takes volumes at once.
const MaxSetMembers = 128

// A SetID names a set, which is snapshots of several volumes that were cut at one moment and are
// all committed or none: "set-" and 17 lower-case hex digits. The empty SetID is no set.
type SetID string

// NewSetID draws a random id: 68 bits, so that it is taken nowhere.
func NewSetID() SetID {
	var b [(idDigits + 1) / 2]byte
	rand.Read(b[:]) // never fails: see crypto/rand
	return SetID(setPrefix + hex.EncodeToString(b[:])[:idDigits])
}

// ParseSetID checks that s is a set's id. Its error wraps [ErrID].
func ParseSetID(s string) (SetID, error) {
	digits, ok := strings.CutPrefix(s, setPrefix)
	if !ok || len(digits) != idDigits || !isHex(digits) {
		return "", fmt.Errorf("%w: set %q", ErrID, s)
	}
	return SetID(s), nil
}

// SetOutcomeKey is where a [SetOutcome] lies.
func SetOutcomeKey(s SetID) string { return KindPrefix(KindSets) + string(s) + setOutcomeName }

const setOutcomeName = "/outcome"

// ParseSetOutcomeKey is the inverse of [SetOutcomeKey]. Its error wraps [ErrID].
func ParseSetOutcomeKey(key string) (SetID, error) {
	id, okPrefix := strings.CutPrefix(key, KindPrefix(KindSets))
	id, okName := strings.CutSuffix(id, setOutcomeName)
	if !okPrefix || !okName {
		return "", fmt.Errorf("%w: key %q is not that of a set's outcome", ErrID, key)
	}
	return ParseSetID(id)
}

// A SetOutcome is created once and ends the attempts of a set, all of them: those that it lists are
// committed, and every other one whose intent names the set is aborted and will never be.
type SetOutcome struct {
	Version int       `json:"version"`
	Set     SetID     `json:"set"`
	State   string    `json:"state"`         // StateCommitted or StateAborted
	Why     string    `json:"why,omitempty"` // aborted: the reason, for people
	End     time.Time `json:"end"`           // when it was made

	// Members are the outcomes of what is committed, in the order in which the volumes were named,
	// each without Description and Tags, which its intent has, and Root, which is an object. None
	// if aborted.
	Members []Outcome `json:"members,omitempty"`
}

// Member returns the outcome of one of the set's snapshots, without what [SetOutcome] says that it
// lacks. ok is false if the set does not list it: then the attempt was aborted.
func (r SetOutcome) Member(id SnapshotID, nonce string) (_ Outcome, ok bool) {
	for _, m := range r.Members {
		if m.Snapshot == id && m.Nonce == nonce {
			return m, true
		}
	}
	return Outcome{}, false
}

func (r SetOutcome) version() int { return r.Version }

func (r SetOutcome) validate() error {
	err := cmp.Or(validSet(r.Set), checkTime("end", r.End))
	if err != nil {
		return err
	}
	switch r.State {
	case StateCommitted:
		return cmp.Or(check(r.Why == "", "why", r.Why), r.validateMembers())
	case StateAborted:
		return check(len(r.Members) == 0, "members of an aborted set", len(r.Members))
	default:
		return check(false, "state", r.State)
	}
}

func (r SetOutcome) validateMembers() error {
	if err := check(len(r.Members) >= 1 && len(r.Members) <= MaxSetMembers, "members", len(r.Members)); err != nil {
		return err
	}
	seen := make(map[SnapshotID]bool)
	for _, m := range r.Members {
		err := cmp.Or(
			check(m.version() == RecordVersion, "member's version", m.Version),
			m.validate(),
			check(m.State == StateCommitted, "member's state", m.State),
			check(m.Set == r.Set, "member's set", m.Set),
			check(len(m.Root) == 0 && m.Description == "" && len(m.Tags) == 0, "root, description or tags of member", m.Snapshot),
			check(!seen[m.Snapshot], "twice a member:", m.Snapshot),
		)
		if err != nil {
			return err
		}
		seen[m.Snapshot] = true
	}
	return nil
}

// validSet checks the id of a set.
func validSet(s SetID) error {
	_, err := ParseSetID(string(s))
	return err
}

// checkSet checks which set a snapshot belongs to, if any.
func checkSet(s SetID) error {
	if s == "" {
		return nil
	}
	return validSet(s)
}
