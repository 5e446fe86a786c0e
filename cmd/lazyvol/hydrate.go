package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

func (a *app) hydrateCommand() *cobra.Command {
	var wait, pause, resume bool
	c := &cobra.Command{
		Use: "hydrate VOL|DIR", Short: "Fetch everything that is missing, or pause and resume that", Args: args(cobra.ExactArgs(1)),
		Long: `Resumes the background hydration of a mounted volume or snapshot; with --wait,
returns when everything is there. A volume that is not mounted is hydrated by the
command itself.`,
		Example: `  lazyvol hydrate --wait vol-0123456789abcdef0
  lazyvol hydrate --pause /mnt/old`,
		RunE: func(c *cobra.Command, args []string) error {
			if pause && (resume || wait) {
				return usageError{errors.New("--pause goes with neither --resume nor --wait")}
			}
			ctx := c.Context()
			s, err := a.statusOf(ctx, args[0])
			if err != nil {
				return err
			}
			if s.PID == 0 {
				if pause || resume {
					return refusal{fmt.Errorf("%s is not mounted", args[0])}
				}
				return a.hydrateUnmounted(ctx, args[0])
			}
			dir, err := a.folderOf(s)
			if err != nil {
				return err
			}
			action := "/resume"
			if pause {
				action = "/pause"
			}
			body, err := dialControl(dir).call(ctx, "POST", action, nil)
			if err != nil {
				return err
			}
			if err := body.Close(); err != nil || !wait {
				return err
			}
			return a.waitHydrated(ctx, s, dir)
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "return when everything is there")
	c.Flags().BoolVar(&pause, "pause", false, "stop fetching in the background")
	c.Flags().BoolVar(&resume, "resume", false, "go on")
	return c
}

// folderOf returns the folder of a running daemon.
func (a *app) folderOf(s statusJSON) (string, error) {
	lock, err := a.lockOf(s)
	if err != nil {
		return "", err
	}
	if lock == "" {
		return "", codedError{fmt.Sprintf("the mount of %s belongs to another state directory than %s", s.ID, a.state), exitNotFound}
	}
	return filepath.Dir(lock), nil
}

// waitHydrated watches a daemon, whose status was s, until everything is there.
func (a *app) waitHydrated(ctx context.Context, s statusJSON, dir string) error {
	bar := a.newProgress(s.ID, s.TotalBytes)
	defer bar.end()
	bar.set(s.HydratedBytes)
	for {
		s, err := askStatus(ctx, dir)
		if err != nil {
			return err
		}
		bar.setOf(s.HydratedBytes, s.TotalBytes)
		switch s.State {
		case hydrate.Done.String():
			bar.finish()
			return nil
		case hydrate.CacheFull.String():
			return fmt.Errorf("the cache is full at %s of %s: %s", size(s.HydratedBytes), size(s.TotalBytes), strings.Join(s.Errors, "; "))
		case hydrate.Paused.String():
			return refusal{errors.New("the hydration was paused")}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// hydrateUnmounted hydrates a volume in this process.
func (a *app) hydrateUnmounted(ctx context.Context, target string) (err error) {
	v, store, err := a.openSettled(ctx, target)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	lock, err := v.LockHydrator()
	if err != nil {
		return refusal{fmt.Errorf("another process hydrates the base of %s: %w", target, err)}
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	h := hydrate.New(source{v.Device}, hydrate.Options{Log: a.log()})
	before := v.Stats()
	bar := a.newProgress(target, before.TotalBytes)
	defer bar.end()
	bar.set(before.HydratedBytes)
	watch, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for watch.Err() == nil {
			bar.set(v.Stats().HydratedBytes)
			if h.Progress().State == hydrate.CacheFull { // and nobody to make room in sight
				stop()
			}
			select {
			case <-watch.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	err = h.Run(watch)
	full := h.Progress().State == hydrate.CacheFull
	stop()
	<-done
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case full:
		err = v.Full()
	case err == nil:
		bar.finish()
	}
	a.noteInitialized(store, v.Record(), err)
	return err
}

// volumeFolder returns the folder of a volume named on the command line.
func (a *app) volumeFolder(target string) (manifest.VolumeID, string, error) {
	id, err := manifest.ParseVolumeID(target)
	if err != nil {
		return "", "", usageError{err}
	}
	return id, volume.Dir(a.state, id), nil
}
