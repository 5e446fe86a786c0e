package integration

import (
	"path/filepath"
	"strings"
	"testing"
)

// What others put into the store reaches the terminal as text, and moves no cursor.
func TestTextsFromTheStoreDoNotCommandTheTerminal(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	s.damaged() // what 'verify' would find
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	const evil = "a\x1b[2Jb\nc"
	s.edit(t, filepath.Join("outcomes", snap), func(record map[string]any) {
		record["description"], record["tags"] = evil, map[string]string{evil: evil}
	})
	for _, args := range [][]string{{"snapshot", "list"}, {"snapshot", "show", snap}, {"snapshot", "tree"}, {"snapshot", "list-bin"}, {"volume", "list"}, {"status"}} {
		out := h.ok(args...)
		if strings.Contains(out, "\x1b") || strings.Contains(out, "b\nc") {
			t.Errorf("%v printed %q", args, out)
		}
	}
	if out := h.ok("snapshot", "show", snap); strings.Count(out, "a [2Jb c") != 3 {
		t.Errorf("printed %q", out)
	}
}
