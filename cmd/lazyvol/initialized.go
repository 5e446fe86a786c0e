package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// initializedName is the file in a volume's folder that is there once its
// initialization was told of: it completes once, however often it is hydrated.
const initializedName = "initialized"

// noteInitialized tells, once for each volume, that all of the snapshot it was
// made from is on this host; or why that failed. The caller has the volume open.
// Killed in between, it is not told.
func (a *app) noteInitialized(store *snapshot.Store, r volume.Record, failed error) {
	if r.Base == nil || failed != nil && !failedJob(failed) {
		return
	}
	if failed == nil {
		f, err := os.OpenFile(filepath.Join(volume.Dir(a.state, r.ID), initializedName), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			a.log().Warn("the end of a volume's initialization is not told", "volume", r.ID, "error", err)
			return
		}
	}
	a.event(store, store.VolumeInitialized(r.ID, failed))
}

// noteInitialized is the app's, for a daemon that serves a volume.
func (d *daemon) noteInitialized(failed error) {
	if d.volume != nil {
		d.app.noteInitialized(d.store, d.volume.Record(), failed)
	}
}
