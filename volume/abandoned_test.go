package volume

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestAbandonedFoldersAreRemovedAndNoOthers(t *testing.T) {
	h := &Host{FS: vfs.OS(), State: t.TempDir()}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(h.RemoveAbandoned()) // there is nothing yet
	made := func(names ...string) manifest.VolumeID {
		t.Helper()
		id := manifest.NewVolumeID()
		must(os.MkdirAll(layersDir(Dir(h.State, id)), 0o700))
		for _, name := range names {
			must(os.WriteFile(filepath.Join(Dir(h.State, id), name), nil, 0o600))
		}
		return id
	}
	gone := []manifest.VolumeID{made(), made(lockName), made(lockName, recordName+".tmp")}
	damaged, busy := made(recordName), made()
	lock, err := h.lockVolume(busy) // its Create has come so far
	must(err)
	if err := h.RemoveAbandoned(); err == nil {
		t.Error("a record that cannot be read went unnoticed")
	}
	for _, id := range gone {
		if _, err := os.Stat(Dir(h.State, id)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", id, err)
		}
	}
	for _, id := range []manifest.VolumeID{damaged, busy} {
		if _, err := os.Stat(layersDir(Dir(h.State, id))); err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	must(lock.Close())
}

// What has lost its record may be the only copy of what was written.
func TestFolderWithALayerIsNeverTakenForAbandoned(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 2)
	w.overwrite(v, data, pageSize, 0, 7)
	w.must(v.Close())
	record := filepath.Join(v.dir, recordName)
	w.must(os.Rename(record, record+".lost"))
	for _, name := range []string{recordName + ".lost", "clean", rootPrefix + v.record.Root.String()} {
		if err := w.host.RemoveAbandoned(); err == nil {
			t.Error("the loss went unnoticed")
		}
		w.must(os.Rename(filepath.Join(v.dir, name), filepath.Join(w.host.State, name)))
	}
	if err := w.host.RemoveAbandoned(); err == nil { // with nothing but its layer left
		t.Error("the loss went unnoticed")
	}
	for _, name := range []string{"clean", rootPrefix + v.record.Root.String()} {
		w.must(os.Rename(filepath.Join(w.host.State, name), filepath.Join(v.dir, name)))
	}
	w.must(os.Rename(filepath.Join(w.host.State, recordName+".lost"), record))
	w.equal(w.open(v.record.ID).Device, data, "found again")
}
