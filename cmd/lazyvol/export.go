package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotExportCommand() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "export SNAP FILE", Short: "Write a snapshot into a raw image file or onto a block device", Args: args(cobra.ExactArgs(2)),
		Long: `Writes a snapshot, verified, into a raw image file, sparse where the snapshot has
holes, or onto a block device. The file appears under its name when it is whole. An
existing file, or a block device, is only overwritten with --force.`,
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			st, err := os.Stat(args[1])
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			if err == nil && !force {
				return refusal{fmt.Errorf("%s exists; overwrite it with --force", args[1])}
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			s, img, err := a.beginSession(ctx, store, id, "")
			if err != nil {
				return err
			}
			defer a.endSession(ctx, s, img)
			if st != nil && st.Mode()&os.ModeDevice != 0 {
				return a.exportDevice(ctx, img, args[1])
			}
			return a.exportFile(ctx, img, args[1])
		},
	}
	c.Flags().BoolVar(&force, "force", false, "overwrite what is there")
	return c
}

func (a *app) exportFile(ctx context.Context, img *snapshot.Image, path string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("export %s: %w", img.ID(), err), f.Close(), os.Remove(f.Name()))
		}
	}()
	if err := f.Truncate(img.Geometry().Size); err != nil {
		return err
	}
	if err := a.exportTo(ctx, img, f); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return f.Close()
}

func (a *app) exportTo(ctx context.Context, img *snapshot.Image, f *os.File) error {
	bar := a.newProgress("export", img.Root.DataBlocks*int64(img.Geometry().BlockSize))
	defer bar.end()
	return img.Export(ctx, f, func(done, _ int64) { bar.set(done) })
}

// exportDevice writes onto a block device, whose holes have to be zeroed.
func (a *app) exportDevice(ctx context.Context, img *snapshot.Image, path string) (err error) {
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
	zeros := make([]byte, 1<<20)
	for off := int64(0); off < img.Geometry().Size; off += int64(len(zeros)) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), img.Geometry().Size-off)], off); err != nil {
			return err
		}
	}
	if err := a.exportTo(ctx, img, f); err != nil {
		return err
	}
	return f.Sync()
}

func (a *app) snapshotVerifyCommand() *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "verify SNAP|--all", Short: "Read snapshots back and check every byte", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			if all == (len(args) == 1) {
				return usageError{errors.New("give a snapshot, or --all")}
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(ctx); err != nil {
				return err
			}
			var ids []manifest.SnapshotID
			if all {
				found, err := store.List(ctx, false)
				if err != nil {
					return err
				}
				for _, d := range found {
					if d.State == snapshot.Completed {
						ids = append(ids, d.ID)
					}
				}
			} else {
				id, err := parseSnapshot(args[0])
				if err != nil {
					return err
				}
				ids = append(ids, id)
			}
			return a.verify(ctx, store, ids)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "every snapshot of the store")
	return c
}

// verify checks snapshots one after the other; what they share is read once.
func (a *app) verify(ctx context.Context, store *snapshot.Store, ids []manifest.SnapshotID) error {
	verifier := snapshot.NewVerifier(store)
	bad := 0
	for _, id := range ids {
		s, img, err := a.beginSession(ctx, store, id, "")
		if err != nil {
			return err
		}
		report, err := verifier.Verify(ctx, id, func(problem error) {
			fmt.Fprintf(a.stderr, "%s: %v\n", id, problem)
		})
		a.endSession(ctx, s, img)
		if err != nil {
			return err
		}
		verdict := "ok"
		if report.Problems > 0 {
			verdict = fmt.Sprintf("%d problems", report.Problems)
			bad++
		}
		fmt.Fprintf(a.stdout, "%s %s\n", id, verdict)
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d snapshots are damaged", bad, len(ids))
	}
	return nil
}
