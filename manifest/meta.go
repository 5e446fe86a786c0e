package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// The modes of a [Lock].
const (
	LockGovernance = "governance" // may be unlocked
	LockCompliance = "compliance" // may only be extended, once its cool-off is over
)

// The states of a [Lock], as EBS names them.
const (
	LockStateCoolOff    = "compliance-cooloff"
	LockStateCompliance = "compliance"
	LockStateGovernance = "governance"
	LockStateExpired    = "expired"
)

// The bounds of a lock: EBS's.
const (
	MaxLockDays     = 36500
	MaxCoolOffHours = 72

	day = 24 * time.Hour
)

// AccountAll is what stands for everybody among the accounts that a snapshot is shared with.
const AccountAll = "all"

const (
	// MaxShares bounds the accounts that a snapshot is shared with.
	MaxShares = 5000

	// maxAccountLength is that of an S3 server's access keys: IAM's bound, in bytes.
	maxAccountLength = 128
)

// ErrAccount is wrapped by the errors of [CheckAccount].
var ErrAccount = errors.New("malformed account")

// A Lock keeps a snapshot from being deleted. Its times are the store's.
type Lock struct {
	Mode    string    `json:"mode"` // LockGovernance or LockCompliance
	Created time.Time `json:"created"`
	Days    int       `json:"days,omitempty"`   // for which it lasts from the end of its snapshot on; 0: Until says
	Until   time.Time `json:"until,omitzero"`   // when it expires
	CoolOff time.Time `json:"coolOff,omitzero"` // compliance: until when it may be undone
}

// Expires returns when the lock of a snapshot that ended then expires. It is the zero time, which
// is never, as long as that is not known.
func (l Lock) Expires(ended time.Time) time.Time {
	if l.Days == 0 {
		return l.Until
	}
	if ended.IsZero() {
		return time.Time{}
	}
	return ended.Add(time.Duration(l.Days) * day)
}

// State returns the state at a time of the lock of a snapshot that ended then; a zero end is not
// known yet.
func (l Lock) State(ended, now time.Time) string {
	expires := l.Expires(ended)
	switch {
	case !expires.IsZero() && !now.Before(expires):
		return LockStateExpired
	case l.Mode == LockGovernance:
		return LockStateGovernance
	case now.Before(l.CoolOff):
		return LockStateCoolOff
	}
	return LockStateCompliance
}

func (l *Lock) validate() error {
	if l == nil {
		return nil
	}
	err := cmp.Or(
		check(l.Mode == LockGovernance || l.Mode == LockCompliance, "lock mode", l.Mode),
		checkTime("lock created", l.Created),
		check(l.Days >= 0 && l.Days <= MaxLockDays, "lock days", l.Days),
		check((l.Days == 0) != l.Until.IsZero(), "lock until", l.Until),
		check(l.CoolOff.IsZero() || l.Mode == LockCompliance, "lock cool-off", l.CoolOff),
	)
	if err == nil && !l.Until.IsZero() {
		err = checkTime("lock until", l.Until)
	}
	if err == nil && !l.CoolOff.IsZero() {
		err = checkTime("lock cool-off", l.CoolOff)
	}
	return err
}

// A Bin says that a snapshot was deleted, and until when it can be brought back. Its times are the
// store's.
type Bin struct {
	Entered time.Time `json:"entered"`
	Until   time.Time `json:"until"`
	Expired bool      `json:"expired,omitempty"` // for good: its tombstone follows
}

func (b *Bin) validate() error {
	if b == nil {
		return nil
	}
	return cmp.Or(checkTime("bin entered", b.Entered), checkTime("bin until", b.Until), check(!b.Until.Before(b.Entered), "bin until", b.Until))
}

// CheckAccount reports whether s can name an account that a snapshot is shared with: the 12 digits of
// one of AWS, or another server's access key, of 1 to 128 letters, digits and "+=,.@_-" of which the
// first is a letter or a digit; or [AccountAll]. Its error wraps [ErrAccount].
func CheckAccount(s string) error {
	valid := len(s) >= 1 && len(s) <= maxAccountLength
	for i := range len(s) {
		c := s[i]
		alphanumeric := c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		valid = valid && (alphanumeric || i > 0 && slices.Contains([]byte("+=,.@_-"), c))
	}
	if !valid {
		return fmt.Errorf("%w: %.140q is neither the 12 digits of an AWS account nor an access key's name", ErrAccount, s)
	}
	return nil
}

func validateShares(shares []string) error {
	if err := check(len(shares) <= MaxShares, "number of shares", len(shares)); err != nil {
		return err
	}
	for i, account := range shares {
		if err := CheckAccount(account); err != nil {
			return err
		}
		if i > 0 && shares[i-1] >= account {
			return check(false, "order of shares", account)
		}
	}
	return nil
}
