package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

func (a *app) snapshotExportCommand() *cobra.Command {
	var force, ignoreErrors bool
	c := &cobra.Command{
		Use: "export SNAP FILE", Short: "Write a snapshot into a raw image file or onto a block device", Args: args(cobra.ExactArgs(2)),
		Long: `Writes a snapshot, verified, into a raw image file, sparse where the snapshot has
holes, or onto a block device. The file appears under its name when it is whole. An
existing file, or a block device, is only overwritten with --force.

With --ignore-errors what is damaged or missing in the store is taken from this
host's caches if they have it. What they lack is left as zeros, listed in FILE.bad,
a line "offset length reason" for each range (of a block device: on stderr), and
the exit code is 1. A store that cannot be reached is no damage, and fails the
export.`,
		Example: `  lazyvol snapshot export snap-1a2b3c4d567890abc disk.img
  lazyvol snapshot export --force snap-1a2b3c4d567890abc /dev/sdb`,
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			path := args[1]
			st, err := os.Stat(path)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if err == nil && !force {
				return refusal{fmt.Errorf("%s exists; overwrite it with --force", path)}
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			e := &export{app: a}
			if ignoreErrors {
				if err := e.openSalvage(ctx, store); err != nil {
					return err
				}
				defer e.salvage.Close() // only read
			}
			end, err := e.open(ctx, store, id)
			if err != nil {
				return err
			}
			defer end()
			e.bar = a.newProgress(id.String(), e.img.Root.DataBlocks*int64(e.img.Geometry().BlockSize))
			defer e.bar.end()
			if st != nil && st.Mode()&os.ModeDevice != 0 {
				if err := e.toDevice(ctx, path); err != nil {
					return err
				}
				e.bar.finish()
				return e.tellLosses(a.stderr)
			}
			return e.toFile(ctx, path, force)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "overwrite what is there")
	c.Flags().BoolVar(&ignoreErrors, "ignore-errors", false, "restore what can be, and list the rest in FILE.bad")
	return c
}

// An export is one export of a snapshot.
type export struct {
	*app
	img     *snapshot.Image
	salvage *volume.Salvage // nil: damage fails the export
	losses  []snapshot.Loss

	bar    *progress
	zeroed int64 // bytes of a block device, before the snapshot's
}

func (e *export) openSalvage(ctx context.Context, store *snapshot.Store) error {
	id, err := store.ID(ctx)
	if snapshot.IsDamage(err) {
		err = nil // and nothing on this host is of a store without an id
	}
	e.salvage = volume.OpenSalvage(vfs.OS(), e.state, id, keyOf(ctx, store))
	return err
}

// open opens and pins the snapshot until end is called. One whose root is damaged
// is opened by what this host has of it.
func (e *export) open(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID) (end func(), err error) {
	s, img, err := e.beginSession(ctx, store, id, "")
	if err == nil {
		e.img = img
		return func() { e.endSession(ctx, s, img) }, nil
	}
	if e.salvage == nil || !snapshot.IsDamage(err) {
		return nil, err
	}
	unpin, err := e.pin(ctx, store, id)
	if err != nil {
		return nil, err
	}
	if e.img, err = store.LoadFrom(ctx, id, e.salvage); err != nil {
		unpin()
		return nil, fmt.Errorf("export %s: %w", id, err)
	}
	return unpin, nil
}

// toFile exports into a file, and lists what is lost beside it.
func (e *export) toFile(ctx context.Context, path string, force bool) (err error) {
	list := path + ".bad"
	if listed, err := fileExists(list); err != nil {
		return err
	} else if listed && !force && e.salvage != nil {
		return refusal{fmt.Errorf("%s exists, of an earlier export; remove it, or overwrite it with --force", list)}
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	failed := func(err error) error {
		return errors.Join(fmt.Errorf("export %s: %w", e.img.ID(), err), f.Close(), os.Remove(f.Name()))
	}
	if err := f.Truncate(e.img.Geometry().Size); err != nil {
		return failed(err)
	}
	if err := e.to(ctx, f); err != nil {
		return failed(err)
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync()); err != nil {
		return failed(err)
	}
	if e.salvage != nil {
		// The list comes first: a file with holes is never there without it.
		if err := e.writeList(list); err != nil {
			return failed(err)
		}
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return failed(err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	e.bar.finish()
	if len(e.losses) == 0 {
		return nil
	}
	return e.verdict(list)
}

func (e *export) to(ctx context.Context, f *os.File) (err error) {
	progress := func(done, total int64) { e.bar.setOf(e.zeroed+done, e.zeroed+total) }
	if e.salvage == nil {
		return e.img.Export(ctx, f, progress)
	}
	e.losses, err = e.img.Rescue(ctx, f, e.salvage, progress)
	return err
}

// writeList writes the list of what is lost; without any there is none.
func (e *export) writeList(path string) error {
	if len(e.losses) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	var list bytes.Buffer
	e.printLosses(&list)
	return vfs.WriteFileAtomic(vfs.OS(), path, list.Bytes())
}

func (e *export) printLosses(w io.Writer) {
	for _, l := range e.losses {
		fmt.Fprintf(w, "%d %d %s\n", l.Offset, l.Length, l.Reason)
	}
}

// tellLosses prints what is lost, and fails if there is any.
func (e *export) tellLosses(w io.Writer) error {
	if len(e.losses) == 0 {
		return nil
	}
	e.printLosses(w)
	return e.verdict("above")
}

// verdict is the error of an export that is not whole.
func (e *export) verdict(list string) error {
	lost := int64(0)
	for _, l := range e.losses {
		lost += l.Length
	}
	return fmt.Errorf("export %s: %s in %d ranges could not be restored and are zeros: see %s", e.img.ID(), size(lost), len(e.losses), list)
}

// toDevice writes onto a block device, whose holes have to be zeroed.
func (e *export) toDevice(ctx context.Context, path string) (err error) {
	img := e.img
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_EXCL, 0) // O_EXCL: not while it is mounted
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = fmt.Errorf("export %s to %s: %w", img.ID(), path, err)
		}
	}()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	if size < img.Geometry().Size {
		return refusal{fmt.Errorf("it has %d bytes, the snapshot %d", size, img.Geometry().Size)}
	}
	data := img.Root.DataBlocks * int64(img.Geometry().BlockSize)
	zeros := make([]byte, 1<<20)
	for off := int64(0); off < img.Geometry().Size; off += int64(len(zeros)) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := f.WriteAt(zeros[:min(int64(len(zeros)), img.Geometry().Size-off)], off)
		if err != nil {
			return err
		}
		e.zeroed += int64(n)
		e.bar.setOf(e.zeroed, img.Geometry().Size+data)
	}
	if err := e.to(ctx, f); err != nil {
		return err
	}
	return f.Sync()
}
