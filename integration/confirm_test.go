package integration

import (
	"strings"
	"testing"
)

// What is on this host only is not deleted by somebody at a terminal who has not said
// that they know.
func TestVolumeDeleteAsksBeforeSomethingIsLost(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	saved := h.ok("volume", "create", "--size", "1MiB")
	dirty := h.ok("volume", "create", "--size", "1MiB")
	m := h.mount(dirty)
	m.write(randomBytes(1, 8192), 0)
	h.fails(4, []string{"in use"}, "volume", "delete", dirty)
	m.unmount()

	s := h.onScreen(140, 24, nil, "volume", "delete", dirty)
	s.waitSee("8.0 KiB", "lost", "Type "+dirty)
	s.press("yes\r")
	if code, screen := s.wait(); code != 4 || !strings.Contains(screen, "nothing was changed") {
		t.Errorf("exit %d\n%s", code, screen)
	}
	s = h.onScreen(140, 24, nil, "volume", "delete", dirty)
	s.waitSee("Type " + dirty)
	s.press("\x03") // Ctrl-C, once
	if code, screen := s.wait(); code != 130 || !strings.Contains(screen, "interrupted") {
		t.Errorf("Ctrl-C: exit %d\n%s", code, screen)
	}
	m = h.mount(dirty) // it is there
	s = h.onScreen(140, 24, nil, "volume", "delete", dirty)
	if code, screen := s.wait(); code != 4 || strings.Contains(screen, "Type") {
		t.Errorf("one that is in use: exit %d\n%s", code, screen)
	}
	m.unmount()
	s = h.onScreen(140, 24, nil, "volume", "delete", dirty)
	s.waitSee("Type " + dirty)
	s.press(dirty + "\r")
	if code, screen := s.wait(); code != 0 {
		t.Errorf("exit %d\n%s", code, screen)
	}
	h.fails(3, nil, "volume", "show", dirty)

	s = h.onScreen(140, 24, nil, "volume", "delete", saved)
	if code, screen := s.wait(); code != 0 || screen != "" {
		t.Errorf("where nothing is lost: exit %d\n%s", code, screen)
	}
}

// A list of nothing says so, to a person; to a program it is a list of nothing.
func TestListsOfNothingSaySo(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	for _, args := range [][]string{{"snapshot", "list"}, {"snapshot", "list", "--filter", "status=pending"}, {"snapshot", "tree"}, {"snapshot", "list-bin"}, {"volume", "list"}, {"status"}} {
		if r := h.run(args...); r.code != 0 || r.stdout != "" || !strings.HasPrefix(r.stderr, "lazyvol: note: ") {
			t.Errorf("%s\nwant a note, and nothing listed", r)
		}
		if r := h.run(append(args, "--json")...); r.code != 0 || !strings.HasPrefix(r.stdout, "{") || r.stderr != "" {
			t.Errorf("%s\nwant an empty list in JSON, and no note", r)
		}
	}
}
