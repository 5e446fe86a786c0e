package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

// What was killed, and what serves out of sight, is not taken for what is mounted in
// its place since.
func TestTheLastOneOnADirectoryIsInSight(t *testing.T) {
	snap := manifest.NewSnapshotID(1)
	begun := func(dir, mountpoint string, hour int) *session {
		return &session{Snapshot: snap, Mountpoint: mountpoint, dir: dir, began: time.Unix(0, 0).Add(time.Duration(hour) * time.Hour)}
	}
	inSight := make(map[string]bool)
	for _, s := range servedSessions([]*session{
		begun("killed", "/mnt/a", 1), begun("mounted", "/mnt/a", 3), begun("out of sight", "/mnt/a", 2),
		begun("elsewhere", "/mnt/b", 1), begun("unmounted", "/mnt/c", 9), begun("export", "", 9),
	}, map[string][]string{snap.String(): {"/mnt/b", "/mnt/a"}}) {
		inSight[s.dir] = s.inSight
	}
	want := map[string]bool{"killed": false, "mounted": true, "out of sight": false, "elsewhere": true, "unmounted": false}
	if diff := cmp.Diff(want, inSight); diff != "" {
		t.Error(diff)
	}
}

// A volume whose record cannot be read may be mounted: it is asked.
func TestADamagedVolumeIsAsked(t *testing.T) {
	a := &app{state: t.TempDir()}
	const id = "vol-0123456789abcdef0"
	dir := volume.Dir(a.state, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "volume.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := a.fleet(); err != nil || len(all) != 1 || all[0].id != id || all[0].inSight {
		t.Errorf("%+v, %v", all, err)
	}
}
