package volume

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestDamagedRootCopyIsFetchedAgain(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 2)
	w.must(v.Close())
	id, file := v.record.ID, rootPath(v.dir, *v.record.Root)
	good, err := os.ReadFile(file)
	w.must(err)
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	for name, damage := range map[string]func() error{
		"flipped bit": func() error { return os.WriteFile(file, bad, 0o600) },
		"cut short":   func() error { return os.Truncate(file, 10) },
		"removed":     func() error { return os.Remove(file) },
	} {
		t.Run(name, func(t *testing.T) {
			w.must(damage())
			w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: errors.New("no answer")})
			if _, err := w.host.OpenVolume(id); err == nil {
				t.Error("opened without a root")
			}
			w.store.Heal()
			v := w.open(id)
			w.equal(v.Device, data, name)
			w.must(v.Close())
			if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, good) {
				t.Errorf("the copy is not mended: %v", err)
			}
		})
	}
}
