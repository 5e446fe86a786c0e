package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// copyFlags are the flags of 'snapshot copy'.
type copyFlags struct {
	to          string
	key         string
	description string
	described   bool // description was given
	copyTags    bool
}

func (a *app) snapshotCopyCommand() *cobra.Command {
	var f copyFlags
	c := &cobra.Command{
		Use: "copy SNAP --to STORE", Short: "Copy a snapshot to another store, or under another key", Args: args(cobra.ExactArgs(1)),
		Long: `Copies a completed snapshot to another store: another bucket, region, endpoint or
folder, or this very store. Prints the id of the copy when it is committed. The copy
stands by itself, and outlives its source.

If the store already has a copy of a snapshot of the same lineage, under the same
key, then only what differs is read and sent. Every block is verified on the way. An
encrypted snapshot stays encrypted: under the key of --key, or else under its own
key's, with a data key of its own. With --key a plain one becomes encrypted.

Interrupted, killed or failed, the copy stays pending, and the same command goes on
with it: what has arrived is not sent again, unless 'lazyvol gc' or a delete there
found it silent for 25 minutes. Tags are copied only with --copy-tags.`,
		Example: `  lazyvol snapshot copy snap-1a2b3c4d567890abc --to 's3://backup/disks?region=eu-west-1'
  lazyvol snapshot copy snap-1a2b3c4d567890abc --to s3://vault/disks --key file:///etc/lazyvol/key`,
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			if f.to == "" {
				return usageError{errors.New("--to STORE says where the copy goes")}
			}
			if err := cmp.Or(manifest.CheckDescription(f.description), checkKey(f.key)); err != nil {
				return err
			}
			f.described = c.Flags().Changed("description")
			return a.copySnapshot(c.Context(), id, &f)
		},
	}
	flags := c.Flags()
	flags.StringVar(&f.to, "to", "", "store `URL` that the copy goes to, as --store")
	flags.StringVar(&f.key, "key", "", "encrypt the copy under the key that this `URI` names ("+keyEnv+"; default: that of the snapshot, if it is encrypted)")
	flags.StringVar(&f.description, "description", "", "what it is (default: what it is a copy of)")
	flags.BoolVar(&f.copyTags, "copy-tags", false, "copy the tags too")
	return c
}

func (a *app) copySnapshot(ctx context.Context, id manifest.SnapshotID, f *copyFlags) error {
	from, err := a.openStore(ctx, "", commandPatience)
	if err != nil {
		return err
	}
	to, err := a.connect(ctx, f.to, commandPatience)
	if err != nil {
		return err
	}
	start := time.Now()
	j := &copyJob{app: a, from: from, to: to.Store, source: id}
	outcome, err := j.run(ctx, f)
	if err == nil || exitCode(err) == exitFailed { // interrupted, it did not end
		a.event(to.Store, to.SnapshotCopied(j.made, id, from, outcome.Parent != nil, start, err))
	}
	if err != nil {
		return err
	}
	how := "all of it"
	if outcome.Parent != nil {
		how = fmt.Sprintf("what differs from %s", outcome.Parent)
	}
	fmt.Fprintf(a.stderr, "stored %s for %s of data, %s, in %s\n", size(outcome.StoredBytes),
		size(outcome.DataBlocks*int64(outcome.BlockSize)), how, time.Since(start).Round(time.Millisecond))
	fmt.Fprintln(a.stdout, outcome.Snapshot)
	return nil
}

// A copyJob is one run of a copy. Its folder in the state directory is locked as long
// as it runs, and holds what the next run needs.
type copyJob struct {
	*app
	from, to *snapshot.Store
	source   manifest.SnapshotID
	made     manifest.SnapshotID // the copy; zero before it is planned

	dir  string
	lock io.Closer
}

func (j *copyJob) run(ctx context.Context, f *copyFlags) (_ manifest.Outcome, err error) {
	var none manifest.Outcome
	record, err := j.open(ctx, f)
	if err != nil {
		return none, err
	}
	ended := record == nil
	defer func() { err = errors.Join(err, j.close(ended)) }()
	session, img, err := j.beginSession(ctx, j.from, j.source, "")
	if errors.Is(err, snapshot.ErrNotFound) && record != nil {
		outcome, err := j.withoutSource(ctx, record, err)
		ended = err == nil || errors.Is(err, snapshot.ErrNotFound)
		return outcome, err
	}
	if err != nil {
		return none, err
	}
	defer j.endSession(ctx, session, img)
	described, err := j.from.Describe(ctx, j.source)
	if err != nil {
		return none, err
	}
	c := &snapshot.Copy{
		From: j.from, Image: img, To: j.to, KeyURI: f.key, Description: f.description, Memory: j.heap(), Log: j.log(),
		Record: record,
		Save: func(r snapshot.CopyRecord) error {
			ended, j.made = false, r.Snapshot
			return j.save(r)
		},
	}
	if f.copyTags {
		c.Tags = described.Tags
	}
	if !f.described {
		c.Description = copyDescription(j.source, j.from, described.Description)
	}
	bar := j.newProgress(j.source.String(), unknownTotal)
	defer bar.end()
	c.Begun = func(attempt *snapshot.Attempt, _ bool) { bar.follow(attempt.Progress) }
	outcome, err := c.Run(ctx)
	switch {
	case err == nil:
		bar.finish()
		j.made = outcome.Snapshot
		ended = true
	case snapshot.IsDamage(err) && ctx.Err() == nil, errors.Is(err, snapshot.ErrAborted):
		ended = true
	case !ended:
		bar.end()
		fmt.Fprintf(j.stderr, "lazyvol: %s stays pending: the same command goes on with it, and 'lazyvol --store %q snapshot delete %s' gives it up\n",
			j.made, j.to, j.made)
	}
	return outcome, err
}

// withoutSource ends a copy whose source is gone: it is given up unless an earlier run
// has committed it.
func (j *copyJob) withoutSource(ctx context.Context, record *snapshot.CopyRecord, gone error) (manifest.Outcome, error) {
	committed, outcome, err := j.to.Resolve(ctx, record.Snapshot, record.Nonce, firstLine(gone))
	if err != nil || committed {
		return outcome, err
	}
	if err := j.to.Discard(ctx, record.Snapshot, snapshot.Holder{}); err != nil {
		return outcome, err
	}
	return outcome, gone
}

const copyRecordName = "copy.json"

// open locks the folder of this copy, and reads what an earlier run left there; nil if
// there was none. Runs of one command share a folder: what they would make is the same.
func (j *copyJob) open(ctx context.Context, f *copyFlags) (*snapshot.CopyRecord, error) {
	fromID, err := j.from.ID(ctx)
	if err != nil {
		return nil, err
	}
	toID, err := j.to.ID(ctx)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%s %s %s %q %v %q %v", fromID, j.source, toID, f.key, f.described, f.description, f.copyTags)
	j.dir = filepath.Join(j.state, "copies", fmt.Sprintf("%s-%.8x", j.source, sha256.Sum256([]byte(what))))
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return nil, err
	}
	j.lock, err = vfs.OS().Lock(filepath.Join(j.dir, lockName), true)
	if errors.Is(err, vfs.ErrLocked) {
		return nil, refusal{fmt.Errorf("%s is being copied to %s by another process", j.source, j.to)}
	}
	if err != nil {
		return nil, err
	}
	record, err := j.load()
	if err != nil {
		return nil, errors.Join(err, j.lock.Close())
	}
	return record, nil
}

func (j *copyJob) load() (*snapshot.CopyRecord, error) {
	path := filepath.Join(j.dir, copyRecordName)
	there, err := fileExists(path)
	if !there || err != nil {
		return nil, err
	}
	data, err := vfs.ReadFile(vfs.OS(), path, manifest.MaxRecordLength)
	if err != nil {
		return nil, err
	}
	record := new(snapshot.CopyRecord)
	if err := json.Unmarshal(data, record); err != nil {
		return nil, fmt.Errorf("read %s (remove it to begin the copy anew): %w", path, err)
	}
	j.made = record.Snapshot
	return record, nil
}

func (j *copyJob) save(r snapshot.CopyRecord) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return vfs.WriteFileAtomic(vfs.OS(), filepath.Join(j.dir, copyRecordName), append(data, '\n'))
}

// close unlocks the folder, and removes it if the copy has ended.
func (j *copyJob) close(ended bool) error {
	var err error
	if ended {
		err = vfs.RemoveLocked(vfs.OS(), j.dir, lockName)
	}
	return errors.Join(err, j.lock.Close())
}

// copyDescription is EBS's, cut to what a description may have.
func copyDescription(id manifest.SnapshotID, from *snapshot.Store, description string) string {
	name := from.String()
	if u, err := url.Parse(name); err == nil {
		u.RawQuery = "" // how to reach it is nobody's business
		name = u.String()
	}
	s := strings.TrimSpace(fmt.Sprintf("[Copied %s from %s] %s", id, name, description))
	for utf8.RuneCountInString(s) > manifest.MaxDescriptionLength {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}
