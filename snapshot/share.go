package snapshot

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/lazyvol/lazyvol/manifest"
)

// MaxShareChanges is how many accounts one Share adds and removes at most: EBS's
// bound.
const MaxShareChanges = 500

// fileKey is what the URIs of keys begin with that lie in a file of their host.
const fileKey = "file:"

// Share changes with which accounts a snapshot is shared, and returns those it is
// shared with then: those in remove go, those in add are added. It is a record:
// who may read the store's objects, the store's own policy says.
//
// ErrNotPermitted: the snapshot is encrypted and cannot be shared with everybody,
// or with nobody if its key is a file; or the store's policy blocks sharing with
// everybody. A policy that blocks it from this moment on may come too late.
func (s *Store) Share(ctx context.Context, id manifest.SnapshotID, add, remove []string) ([]string, error) {
	shares, err := s.share(ctx, id, add, remove)
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", id, err)
	}
	return shares, nil
}

func (s *Store) share(ctx context.Context, id manifest.SnapshotID, add, remove []string) (shares []string, err error) {
	if n := len(add) + len(remove); n > MaxShareChanges {
		return nil, fmt.Errorf("%w: %d changes are more than %d at once", manifest.ErrAccount, n, MaxShareChanges)
	}
	for _, account := range slices.Concat(add, remove) {
		if err := manifest.CheckAccount(account); err != nil {
			return nil, err
		}
	}
	d, err := s.existing(ctx, id)
	if err != nil {
		return nil, err
	}
	if len(add) > 0 {
		if err := s.mayShare(ctx, d, slices.Contains(add, manifest.AccountAll)); err != nil {
			return nil, err
		}
	}
	err = s.changeMeta(ctx, d, func(m *manifest.Meta) error {
		if err := checkBin(id, m); err != nil {
			return err
		}
		shares = slices.DeleteFunc(slices.Concat(m.Shares, add), func(account string) bool { return slices.Contains(remove, account) })
		slices.Sort(shares)
		shares = slices.Compact(shares)
		if len(shares) > manifest.MaxShares {
			return fmt.Errorf("%w: %d accounts are more than %d", ErrNotPermitted, len(shares), manifest.MaxShares)
		}
		m.Shares = shares
		return nil
	})
	return shares, err
}

// mayShare is nil if a snapshot may be shared with more accounts, or everybody.
func (s *Store) mayShare(ctx context.Context, d Description, everybody bool) error {
	if d.State == Pending {
		return fmt.Errorf("%w: %s", ErrPending, d.ID)
	}
	encryption, err := s.encryption(ctx, d.ID.Lineage)
	switch {
	case err != nil:
		return err
	case encryption != nil && strings.HasPrefix(encryption.KeyURI, fileKey):
		return fmt.Errorf("%w: it is encrypted under %s, which others cannot use; copy it to a key of a key service first", ErrNotPermitted, encryption.KeyURI)
	case !everybody:
		return nil
	case encryption != nil:
		return fmt.Errorf("%w: an encrypted snapshot cannot be public", ErrNotPermitted)
	}
	policy, err := s.Policy(ctx)
	if err == nil && policy.Public() != manifest.PublicUnblocked {
		err = fmt.Errorf("%w: the store's policy is %s ('lazyvol policy show')", ErrNotPermitted, policy.Public())
	}
	return err
}
