package cache

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

const recordStore = "000102030405060708090a0b0c0d0e0f"

func newRecords(folder string) Records {
	return Records{FS: vfs.OS(), Folder: folder, Log: slog.New(slog.DiscardHandler)}
}

// someRecords makes n records, the one numbered i of generation g.
func someRecords(n, g int) map[string][]byte {
	records := make(map[string][]byte)
	for i := range n {
		records[fmt.Sprintf("outcomes/snap-%d etag %d", i, g)] = fmt.Appendf(nil, "{\"record\": %d,\n\x00 %d}", i, g)
	}
	return records
}

func TestRecordsAreKeptByStore(t *testing.T) {
	r := newRecords(filepath.Join(t.TempDir(), "not yet", "records"))
	if got := r.Load(recordStore); len(got) != 0 {
		t.Errorf("before anything was saved there is %v", got)
	}
	one, other := someRecords(20, 1), someRecords(3, 2)
	r.Save(recordStore, one)
	r.Save("other", other)
	if diff := cmp.Diff(one, r.Load(recordStore)); diff != "" {
		t.Errorf("(-saved +loaded)\n%s", diff)
	}
	if diff := cmp.Diff(other, r.Load("other")); diff != "" {
		t.Errorf("of the other store (-saved +loaded)\n%s", diff)
	}
	r.Save(recordStore, other)
	if diff := cmp.Diff(other, r.Load(recordStore)); diff != "" {
		t.Errorf("saved anew (-saved +loaded)\n%s", diff)
	}
}

// Each byte in turn is changed, and the file cut there: what is loaded then is
// what was saved, or missing.
func TestDamagedRecordsAreMissing(t *testing.T) {
	r := newRecords(t.TempDir())
	saved := someRecords(6, 1)
	r.Save(recordStore, saved)
	file := filepath.Join(r.Folder, recordStore)
	whole, err := os.ReadFile(file)
	must(t, err)
	check := func(what string, data []byte, least int) {
		t.Helper()
		must(t, os.WriteFile(file, data, 0o600))
		loaded := r.Load(recordStore)
		for name, record := range loaded {
			if !bytes.Equal(saved[name], record) {
				t.Fatalf("%s: %q is %q", what, name, record)
			}
		}
		if len(loaded) < least {
			t.Fatalf("%s: only %d of %d are left", what, len(loaded), len(saved))
		}
	}
	for at := range whole {
		for _, flip := range []byte{1, 0x80, '\n' ^ whole[at]} {
			damaged := bytes.Clone(whole)
			damaged[at] ^= flip
			least := len(saved) - 2 // a line that ends in the wrong place takes the next one with it
			if at < len(recordsMagic) {
				least = 0
			}
			check(fmt.Sprintf("byte %d changed by %#x", at, flip), damaged, least)
		}
		check(fmt.Sprintf("cut to %d bytes", at), whole[:at], 0)
	}
}

func TestRecordsAreBounded(t *testing.T) {
	r := newRecords(t.TempDir())
	big := strings.Repeat("x", maxRecordsLength/8)
	records := make(map[string][]byte)
	for i := range 10 {
		records[fmt.Sprint(i)] = []byte(big)
	}
	r.Save(recordStore, records)
	info, err := os.Stat(filepath.Join(r.Folder, recordStore))
	must(t, err)
	if n := len(r.Load(recordStore)); info.Size() > maxRecordsLength || n < 4 || n >= 10 {
		t.Errorf("%d records in %d bytes are kept", n, info.Size())
	}
	must(t, os.Truncate(filepath.Join(r.Folder, recordStore), maxRecordsLength+1))
	if n := len(r.Load(recordStore)); n != 0 {
		t.Errorf("%d records are loaded of a file that is too large", n)
	}
}

func TestRecordsOfManyWritersAreNotMixed(t *testing.T) {
	folder := t.TempDir()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			r := newRecords(folder)
			for range 20 {
				r.Save(recordStore, someRecords(50, g))
				of := make(map[string]bool)
				for name := range r.Load(recordStore) {
					of[name[strings.LastIndex(name, " "):]] = true
				}
				if len(of) > 1 {
					t.Errorf("what is loaded was saved by several: %v", of)
				}
			}
		})
	}
	wg.Wait()
	if n := len(newRecords(folder).Load(recordStore)); n != 50 {
		t.Errorf("%d records are left of 50", n)
	}
}

// Whichever call fails, and wherever the power goes, what is loaded afterwards is
// one of what was saved before and what was being saved.
func TestRecordsOutliveFaults(t *testing.T) {
	before, after := someRecords(5, 1), someRecords(7, 2)
	for n := 0; ; n++ {
		c := vfs.NewCrash(uint64(n))
		must(t, c.MkdirAll("/records", 0o700))
		must(t, c.SyncDir("/"))
		r := Records{FS: c, Folder: "/records", Log: slog.New(slog.DiscardHandler)}
		r.Save(recordStore, before)
		c.StopCall(n)
		r.Save(recordStore, after)
		stopped := c.Faulted()
		c.ClearFault()
		c.PowerCut()
		got := r.Load(recordStore)
		if !cmp.Equal(got, before) && !cmp.Equal(got, after) && len(got) != 0 {
			t.Fatalf("stopped at call %d: %v", n, got)
		}
		if !stopped {
			if !cmp.Equal(got, after) {
				t.Fatalf("unharmed: %v", got)
			}
			return
		}
	}
}
