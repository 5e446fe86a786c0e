package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotShareCommand() *cobra.Command {
	var add, remove []string
	var account string
	var policy, asJSON bool
	c := &cobra.Command{
		Use: "share SNAP (--add ACCOUNT|all... | --remove ACCOUNT|all... | --policy)", Short: "Share a snapshot with other accounts", Args: args(cobra.ExactArgs(1)),
		Long: `Records with which accounts a snapshot is shared: the 12 digits of an AWS account,
another server's access key, or all. Encrypted snapshots cannot be shared with all, nor
with anybody if their key is a file. Without a change it prints whom it is shared with.

The record alone lets nobody in: the bucket's policy does. --policy prints the least one
that lets those accounts, or --account, mount and copy the snapshot with credentials of
their own that may only read, and tells on stderr what else it shows them. Add its
statements to the bucket's policy, and take them out again when the sharing ends; for an
encrypted snapshot let the account use the key, too. Without a pin, which they may not
write, their reads fail if the snapshot is deleted meanwhile: a copy is theirs.`,
		Example: `  lazyvol snapshot share snap-1a2b3c4d567890abc --add 123456789012
  lazyvol snapshot share snap-1a2b3c4d567890abc --policy --account 123456789012 > policy.json`,
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			if policy && len(add)+len(remove) > 0 {
				return combinationError{errors.New("--policy goes without --add and --remove")}
			}
			if account != "" && !policy {
				return combinationError{errors.New("--account goes with --policy")}
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if policy {
				return a.printSharePolicy(ctx, store, id, account)
			}
			return a.share(ctx, store, id, add, remove, asJSON)
		},
	}
	flags := c.Flags()
	flags.StringSliceVar(&add, "add", nil, "share it with `ACCOUNT`, or all (repeatable)")
	flags.StringSliceVar(&remove, "remove", nil, "share it with `ACCOUNT`, or all, no more (repeatable)")
	flags.BoolVar(&policy, "policy", false, "print the bucket policy that lets them read it")
	flags.StringVar(&account, "account", "", "with --policy, for this `ACCOUNT` only")
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) share(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID, add, remove []string, asJSON bool) error {
	start := time.Now()
	before, err := store.Describe(ctx, id)
	if err != nil {
		return err
	}
	shares := before.Shares
	if len(add)+len(remove) > 0 {
		if shares, err = store.Share(ctx, id, add, remove); err != nil {
			return err
		}
	}
	for _, account := range add {
		// EBS tells recipients, of private shares only.
		if account != manifest.AccountAll && !slices.Contains(before.Shares, account) && slices.Contains(shares, account) {
			a.event(store, store.SnapshotShared(id, account, before.Owner, start, nil))
		}
	}
	if !asJSON {
		for _, account := range shares {
			fmt.Fprintln(a.stdout, account)
		}
		return nil
	}
	before.Shares = shares
	p, err := a.protection(ctx, store, before)
	if err != nil {
		return err
	}
	list := struct {
		SnapshotId              string
		CreateVolumePermissions []permission
		PublicAccessBlocked     bool `json:",omitempty"`
	}{id.String(), []permission{}, p.PublicAccessBlocked}
	list.CreateVolumePermissions = append(list.CreateVolumePermissions, p.CreateVolumePermissions...)
	return printJSON(a.stdout, list)
}

// printSharePolicy prints the bucket policy for an account that a snapshot is
// shared with; "" is all of them.
func (a *app) printSharePolicy(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID, account string) error {
	accounts, err := a.sharees(ctx, store, id, account)
	if err != nil {
		return err
	}
	grant, err := store.Grant(ctx, id)
	if err != nil {
		return err
	}
	data, byOwner, err := sharePolicy(grant, id, accounts, store.String())
	if err != nil {
		return err
	}
	fmt.Fprintf(a.stderr, "this policy lets %s read %s\n", strings.Join(accounts, ", "), id)
	for _, line := range exposed(grant, byOwner) {
		fmt.Fprintf(a.stderr, "it also shows %s\n", line)
	}
	_, err = fmt.Fprintf(a.stdout, "%s\n", data)
	return err
}

// sharePolicy returns the bucket policy of a grant. If that is too long, it names
// the snapshots that own the data, and not their objects.
func sharePolicy(grant *snapshot.Grant, id manifest.SnapshotID, accounts []string, url string) (data []byte, byOwner bool, err error) {
	policy := blockstore.ReadPolicy{
		Accounts: accounts, Name: "Lazyvol" + strings.TrimPrefix(id.String(), "snap-"),
		Keys: grant.Keys, Prefixes: grant.Absent,
	}
	if data, err = policy.JSON(url); !errors.Is(err, blockstore.ErrTooLarge) {
		return data, false, err
	}
	policy.Keys = grant.Owners
	if data, err = policy.JSON(url); errors.Is(err, blockstore.ErrTooLarge) {
		err = fmt.Errorf("%w: make a copy of %s, which has all its data itself ('lazyvol snapshot copy'), and share that", err, id)
	}
	return data, true, err
}

// exposed tells what a grant shows besides the blocks of its snapshot.
func exposed(grant *snapshot.Grant, byOwner bool) []string {
	lines := []string{"its records: description, tags, lock, the other accounts it is shared with, the store's id, and its lineage's, with the wrapped key if it is encrypted"}
	switch {
	case byOwner && grant.Foreign > 0:
		lines = append(lines, fmt.Sprintf("%s of other snapshots: named one by one its objects do not fit into a policy, so that it lets them read all that the snapshots uploaded from which it inherits blocks", size(grant.Foreign)))
	case grant.Beside > 0:
		lines = append(lines, fmt.Sprintf("%s of other snapshots: %d of the packs that it needs hold blocks of theirs, too", size(grant.Beside), grant.Packs))
	}
	return lines
}

// sharees returns the accounts that a policy is for: those that a snapshot is
// shared with, or that one of them that is named.
func (a *app) sharees(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID, account string) ([]string, error) {
	if account != "" {
		if err := manifest.CheckAccount(account); err != nil {
			return nil, err
		}
	}
	d, err := store.Describe(ctx, id)
	if err != nil {
		return nil, err
	}
	p, err := a.protection(ctx, store, d)
	if err != nil {
		return nil, err
	}
	shares := slices.Clone(d.Shares)
	public := slices.Contains(shares, manifest.AccountAll)
	if p.PublicAccessBlocked {
		public = false
		shares = slices.DeleteFunc(shares, func(s string) bool { return s == manifest.AccountAll })
	}
	switch {
	case account != "" && (public || slices.Contains(shares, account)):
		return []string{account}, nil
	case account != "":
		return nil, refusal{fmt.Errorf("%s is not shared with %s ('lazyvol snapshot share %s --add %s')", id, account, id, account)}
	case len(shares) == 0:
		return nil, refusal{fmt.Errorf("%s is shared with nobody ('lazyvol snapshot share %s --add ACCOUNT')", id, id)}
	case public:
		return []string{manifest.AccountAll}, nil
	}
	return shares, nil
}
