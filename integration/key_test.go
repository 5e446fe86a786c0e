package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeyFileIsMadeByOneOfManyAndForItsOwnerOnly(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	path := filepath.Join(h.dir, "disks.key")
	var all []*running
	for range 4 {
		all = append(all, h.begin("key", "generate", path))
	}
	made := 0
	for _, r := range all {
		res := r.wait()
		switch {
		case res.code == 0 && res.stdout == "file://"+path+"\n":
			made++
		case res.code != 4 || res.stdout != "" || !strings.Contains(res.stderr, path):
			t.Errorf("%s", res)
		}
	}
	if made != 1 {
		t.Errorf("%d of %d made the same key", made, len(all))
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("the key's mode is %v", info.Mode())
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{"exists", "left as it is"}, "key", "generate", path)
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the refusal changed the key (%v)", err)
	}
	h.fails(1, []string{"no such file"}, "key", "generate", filepath.Join(h.dir, "nowhere", "key"))
	h.fails(2, nil, "key", "generate")
	h.fails(2, nil, "key")
	if left := entries(t, h.state); len(left) != 0 {
		t.Errorf("making a key left %v in the state directory", left)
	}
}
