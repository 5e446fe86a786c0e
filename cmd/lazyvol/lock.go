package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotLockCommand() *cobra.Command {
	var r snapshot.LockRequest
	var until string
	var coolOff int
	var asJSON bool
	c := &cobra.Command{
		Use: "lock SNAP --mode MODE (--days N | --until DATE)", Short: "Keep a snapshot from being deleted", Args: args(cobra.ExactArgs(1)),
		Long: `Locks a snapshot, or changes its lock, as EBS does: no lazyvol deletes it before the
lock expires. In governance mode it can be unlocked and changed at any time. In
compliance mode that is possible in the cool-off period only; afterwards nobody can
unlock it, and it can only be extended. A pending snapshot can be locked too: its days
count from its completion on.

Time is the store's own. The lock is kept by lazyvol's own commands: whoever may write
the bucket can still remove its objects. Where that matters, give hosts credentials
that may not delete, or use the bucket's own object lock.`,
		Example: `  lazyvol snapshot lock snap-1a2b3c4d567890abc --mode governance --days 30
  lazyvol snapshot lock snap-1a2b3c4d567890abc --mode compliance --until 2027-01-01 --cool-off 24`,
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			if until != "" {
				if r.Until, err = parseDate(until); err != nil {
					return err
				}
			}
			if c.Flags().Changed("cool-off") && (coolOff < 1 || coolOff > manifest.MaxCoolOffHours) {
				return usageError{fmt.Errorf("--cool-off %d: it lasts 1 to %d hours", coolOff, manifest.MaxCoolOffHours)}
			}
			if r.Days != 0 && until != "" {
				return combinationError{errors.New("--days and --until exclude each other")}
			}
			r.CoolOff = time.Duration(coolOff) * time.Hour
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			lock, err := store.SetLock(c.Context(), id, r)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(a.stdout, struct {
					SnapshotId string
					lockJSON
				}{id.String(), newLockJSON(lock)})
			}
			fmt.Fprintf(a.stderr, "%s is locked: %s\n", id, describeLock(lock))
			return nil
		},
	}
	flags := c.Flags()
	flags.StringVar(&r.Mode, "mode", "", "governance or compliance")
	flags.IntVar(&r.Days, "days", 0, fmt.Sprintf("lock it for `N` days, 1 to %d", manifest.MaxLockDays))
	flags.StringVar(&until, "until", "", "lock it until `DATE`: 2027-01-31, or with a time as 2027-01-31T12:00:00Z")
	flags.IntVar(&coolOff, "cool-off", 0, fmt.Sprintf("compliance: for so many `hours`, 1 to %d, it can still be undone (default: it cannot)", manifest.MaxCoolOffHours))
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) snapshotUnlockCommand() *cobra.Command {
	return &cobra.Command{
		Use: "unlock SNAP", Short: "Take a snapshot's lock away", Args: args(cobra.ExactArgs(1)),
		Example: "  lazyvol snapshot unlock snap-1a2b3c4d567890abc",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			return store.Unlock(c.Context(), id)
		},
	}
}

// parseDate parses a date, in the host's time zone, or a time.
func parseDate(s string) (time.Time, error) {
	if t, err := time.ParseInLocation(time.DateOnly, s, time.Local); err == nil {
		return t, nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return t, usageError{fmt.Errorf("%q is neither a date like 2027-01-31 nor a time like 2027-01-31T12:00:00Z", s)}
	}
	return t, nil
}

// lockJSON is a lock with EBS's names. LockExpiresOn is missing as long as its
// snapshot is pending.
type lockJSON struct {
	LockState              string     `json:",omitempty"`
	LockDuration           int        `json:",omitempty"` // days, of one that was pending
	LockCreatedOn          *time.Time `json:",omitempty"`
	LockExpiresOn          *time.Time `json:",omitempty"`
	CoolOffPeriodExpiresOn *time.Time `json:",omitempty"`
}

func newLockJSON(l *snapshot.LockState) lockJSON {
	if l == nil {
		return lockJSON{}
	}
	return lockJSON{l.State, l.Days, known(l.Created), known(l.Expires), known(l.CoolOff)}
}

// known is a time, or nil for none.
func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// describeLock tells people of a lock.
func describeLock(l *snapshot.LockState) string {
	text := l.State
	switch {
	case l.Expires.IsZero():
		text += fmt.Sprintf(", for %d days from its completion on", l.Days)
	case l.State == manifest.LockStateExpired:
		text += " " + l.Expires.Local().Format(time.DateTime)
	default:
		text += ", until " + l.Expires.Local().Format(time.DateTime)
	}
	if l.State == manifest.LockStateCoolOff {
		text += "; it can be undone until " + l.CoolOff.Local().Format(time.DateTime)
	}
	return text
}

// A protectionJSON is what keeps a snapshot, and who may use it.
type protectionJSON struct {
	lockJSON
	CreateVolumePermissions []permission `json:",omitempty"`
	PublicAccessBlocked     bool         `json:",omitempty"` // by the store's policy: it counts as not shared with all
}

// A permission is whom a snapshot is shared with, as EBS has it.
type permission struct {
	Group  string `json:",omitempty"`
	UserId string `json:",omitempty"`
}

// protection looks up what the snapshot's own records do not tell.
func (a *app) protection(ctx context.Context, store *snapshot.Store, d snapshot.Description) (p protectionJSON, err error) {
	if d.Lock != nil {
		now, err := store.Now(ctx)
		if err != nil {
			return p, err
		}
		p.lockJSON = newLockJSON(d.LockState(now))
	}
	for _, account := range d.Shares {
		if account != manifest.AccountAll {
			p.CreateVolumePermissions = append(p.CreateVolumePermissions, permission{UserId: account})
			continue
		}
		p.CreateVolumePermissions = append(p.CreateVolumePermissions, permission{Group: account})
		policy, err := store.Policy(ctx)
		if err != nil {
			return p, err
		}
		p.PublicAccessBlocked = policy.Public() == manifest.PublicBlockAll
	}
	return p, nil
}

// rows gives what there is to people.
func (p protectionJSON) rows(row func(name, value string)) {
	if p.LockState != "" {
		until := ""
		if p.LockExpiresOn != nil {
			until = ", " + p.LockExpiresOn.Local().Format(time.DateTime)
		}
		row("lock", p.LockState+until)
	}
	for _, share := range p.CreateVolumePermissions {
		with := share.UserId
		if share.Group != "" {
			with = share.Group
			if p.PublicAccessBlocked {
				with += " (blocked by the store's policy)"
			}
		}
		row("shared with", with)
	}
}
