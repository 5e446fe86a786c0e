package integration

import (
	"slices"
	"strings"
	"testing"
)

func TestPruneDeletesWhatNoRuleKeeps(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	vol := h.ok("volume", "create", "--size", "4MiB")
	m := h.mount(vol)
	var snaps []string
	var contents [][]byte
	for n := range 5 {
		p := randomBytes(uint64(n), 64*kib)
		m.write(p, int64(n)*mib/2)
		tag := "--tag=by=timer"
		if n == 0 {
			tag = "--tag=by=hand"
		}
		snaps = append(snaps, h.ok("snapshot", "create", tag, vol))
		contents = append(contents, m.read(0, 4*mib))
	}
	image := h.ok("snapshot", "create", "--tag=by=timer", h.image(randomBytes(9, mib))) // counts for itself

	all := strings.Fields(h.ok("snapshot", "list"))
	for filter, want := range map[string][]string{"tag:by=t*r": append(slices.Clone(snaps[1:]), image), "volume-id=vol-ffffffff": {image}, "status=pending": nil} {
		var found []string
		for line := range strings.Lines(h.ok("snapshot", "list", "--filter", filter)) {
			if id := strings.Fields(line)[0]; strings.HasPrefix(id, "snap-") {
				found = append(found, id)
			}
		}
		if !slices.Equal(found, want) {
			t.Errorf("--filter %s lists %v, want %v", filter, found, want)
		}
	}
	h.fails(2, []string{"volume-size"}, "snapshot", "list", "--filter", "size=4")
	planned := h.ok("snapshot", "prune", "--keep-last", "2", "--tag", "by=timer", "--dry-run")
	for i, snap := range append(slices.Clone(snaps), image) {
		want := map[int]string{0: "", 1: "delete", 2: "delete", 3: "keep", 4: "keep", 5: "keep"}[i]
		line := ""
		for l := range strings.Lines(planned) {
			if strings.HasPrefix(l, snap) {
				line = l
			}
		}
		if (want == "") != (line == "") || !strings.Contains(line, want) {
			t.Errorf("snapshot %d: %q, want %q", i, line, want)
		}
	}
	if now := strings.Fields(h.ok("snapshot", "list")); !slices.Equal(now, all) {
		t.Error("--dry-run changed something")
	}

	deleted := strings.Fields(h.ok("snapshot", "prune", "--keep-last", "2", "--tag", "by=timer"))
	want := slices.Clone(snaps[1:3])
	slices.Sort(deleted)
	slices.Sort(want)
	if !slices.Equal(deleted, want) {
		t.Errorf("deleted %v, want %v", deleted, want)
	}
	for _, snap := range want {
		h.fails(3, []string{snap}, "snapshot", "show", snap)
	}
	for _, n := range []int{0, 3, 4} {
		sameBytes(t, "what is left", h.exported(snaps[n]), contents[n])
	}
	if got := h.ok("snapshot", "prune", "--keep-last=-1", "--keep-daily=1"); got != "" {
		t.Errorf("deleted %s, and all was to be kept", got)
	}
	h.fails(2, []string{"--keep-last"}, "snapshot", "prune")
	h.fails(2, []string{"--keep-last"}, "snapshot", "prune", "--tag", "by=timer", "--dry-run")
	h.fails(2, []string{"-1 keeps all"}, "snapshot", "prune", "--keep-daily=-2")
	h.fails(2, []string{"KEY=VALUE"}, "snapshot", "prune", "--keep-last=1", "--tag", "timer")
}
