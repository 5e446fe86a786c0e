package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

// layer makes the folder of a write layer, and returns when it was made.
func layer(t *testing.T, dir string, n int64) time.Time {
	t.Helper()
	name := filepath.Join(dir, "layers", strconv.FormatInt(n, 10))
	if err := os.MkdirAll(name, 0o700); err != nil {
		t.Fatal(err)
	}
	made := born(name)
	if made.IsZero() {
		t.Fatal("this filesystem does not know when a file was made")
	}
	return made
}

func TestTheOldestUnsavedWriteIsKnownAcrossRestarts(t *testing.T) {
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	base, root := manifest.NewSnapshotID(1), manifest.NewSnapshotID(1)
	r := volume.Record{Base: &base, Root: &base, Layers: []int64{1}}
	first := layer(t, dir, 1)
	at := func(minutes int) time.Time { return first.Add(time.Hour).Add(time.Duration(minutes) * time.Minute) }
	expect := func(what string, got freshTimes, snapshot, since time.Time) {
		t.Helper()
		if !got.Snapshot.Equal(snapshot) || !got.DirtySince.Equal(since) {
			t.Errorf("%s: snapshot %v, dirty since %v; want %v, %v", what, got.Snapshot, got.DirtySince, snapshot, since)
		}
	}
	none := time.Time{}

	f := newFreshness(dir, log)
	expect("new", f.look(r, 0, at(0)), none, none)
	expect("written to", f.look(r, 4096, at(1)), none, at(1))
	expect("and again", f.look(r, 8192, at(9)), none, at(1))
	f = newFreshness(dir, log)
	expect("opened again", f.look(r, 8192, at(20)), none, at(1))
	r.Layers = []int64{1, 2}
	cut := layer(t, dir, 2)
	expect("while a snapshot is made", f.look(r, 9000, at(30)), none, at(1))
	r.Layers = []int64{2}
	expect("which failed", f.look(r, 9000, at(31)), none, at(1))
	r.Root = &root
	expect("which was made, and written to meanwhile", f.look(r, 100, at(32)), cut, cut)
	r.Layers, r.Root = []int64{3}, &base
	r.Base = nil
	cut = layer(t, dir, 3)
	expect("made, of all", f.look(r, 0, at(33)), cut, none)
	f = newFreshness(dir, log)
	expect("opened again, clean", f.look(r, 0, at(40)), cut, none)
	f = newFreshness(dir, log)
	expect("opened after a daemon that was killed just after a first write", f.look(r, 10, at(50)), cut, cut)

	// Without its file the worst is told, never that nothing is old.
	if err := os.WriteFile(filepath.Join(dir, freshnessName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	f = newFreshness(dir, log)
	expect("damaged", f.look(r, 10, at(60)), cut, cut)
	if err := os.Remove(filepath.Join(dir, freshnessName)); err != nil {
		t.Fatal(err)
	}
	f = newFreshness(dir, log)
	expect("gone", f.look(r, 10, at(60)), cut, cut)
	blank := volume.Record{Layers: []int64{3}}
	if err := os.Remove(filepath.Join(dir, freshnessName)); err != nil {
		t.Fatal(err)
	}
	f = newFreshness(dir, log)
	expect("a blank volume, never saved", f.look(blank, 10, at(60)), none, cut)
}
