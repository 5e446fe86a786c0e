package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWrongCommandLinesAreUsageErrors(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for _, args := range [][]string{
		{"frobnicate"},
		{"snapshot"},
		{"snapshot", "frobnicate"},
		{"snapshot", "create"},
		{"snapshot", "create", "a", "b"},
		{"snapshot", "create", "--frobnicate", "a"},
		{"snapshot", "create", "--tag", "no-value", "a"},
		{"snapshot", "create", "--description", strings.Repeat("x", 300), "a"},
		{"snapshot", "show", "snap-zzz"},
		{"snapshot", "show", "snap-0000000100000000"},
		{"snapshot", "show", "SNAP-00000001000000001"},
		{"snapshot", "show", "vol-00000000000000001"},
		{"snapshot", "delete", "snap-1"},
		{"snapshot", "export", "snap-1", "out"},
		{"snapshot", "tag", "snap-00000001000000001"},
		{"snapshot", "diff", "snap-1", "snap-2"},
		{"snapshot", "verify"},
		{"volume", "show", "vol-1"},
		{"volume", "create", "--snapshot", "snap-1"},
		{"mount", "disk.img", "/mnt"},
		{"mount", "snap-1", "/mnt"},
		{"mount", "--read-deadline", "-1s", "vol-00000000000000001", "/mnt"},
		{"hydrate", "--pause", "--wait", "vol-00000000000000001"},
	} {
		t.Run(fmt.Sprintf("%.40s", strings.Join(args, " ")), func(t *testing.T) {
			h.in(t).fails(2, nil, args...)
		})
	}
}

func TestUnknownThingsAreNotFound(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	known := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	stranger := known[:len(known)-1] + map[bool]string{true: "1", false: "0"}[strings.HasSuffix(known, "0")]
	for _, snap := range []string{"snap-00000001000000001", stranger} { // of no lineage, and of one
		for _, args := range [][]string{
			{"snapshot", "show", snap},
			{"snapshot", "export", snap, filepath.Join(h.dir, "out.img")},
			{"snapshot", "verify", snap},
			{"snapshot", "delete", snap},
			{"snapshot", "tag", snap, "a=b"},
			{"snapshot", "diff", known, snap},
			{"snapshot", "create", "--parent", snap, h.image(make([]byte, 512))},
			{"volume", "create", "--snapshot", snap},
			{"mount", snap, t.TempDir()},
			{"attach", snap},
		} {
			h.fails(3, []string{snap}, args...)
		}
	}
	vol := "vol-00000000000000001"
	for _, args := range [][]string{
		{"volume", "show", vol}, {"volume", "delete", vol}, {"volume", "forget", vol}, {"mount", vol, t.TempDir()}, {"attach", vol},
		{"detach", vol}, {"status", vol}, {"hydrate", vol}, {"unmount", vol}, {"snapshot", "create", vol},
	} {
		h.fails(3, []string{vol}, args...)
	}
	h.fails(3, nil, "unmount", h.dir)
	h.fails(3, nil, "status", h.dir)
	if left := entries(t, filepath.Join(h.state, "mounts")); len(left) != 0 {
		t.Errorf("the refusals left sessions: %v", left)
	}
	if left := entries(t, filepath.Join(h.state, "store", "pins")); len(left) != 0 {
		t.Errorf("the refusals left pins: %v", left)
	}
}

// entries lists a folder, which may be missing.
func entries(t testing.TB, dir string) []string {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range found {
		names = append(names, e.Name())
	}
	return names
}

func TestUnusableMountpointsAreNamed(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	missing := filepath.Join(h.dir, "missing")
	file := filepath.Join(h.dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	m := h.mount(snap)
	h.fails(1, []string{missing, "does not exist"}, "mount", snap, missing)
	h.fails(1, []string{file, "not a directory"}, "mount", snap, file)
	h.fails(4, []string{m.dir, "already"}, "mount", snap, m.dir)
	if sessions := entries(t, filepath.Join(h.state, "mounts")); len(sessions) != 1 {
		t.Errorf("sessions: %v", sessions)
	}
	m.read(0, 1)
}

func TestExportDoesNotOverwrite(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	file := filepath.Join(h.dir, "out.img")
	if err := os.WriteFile(file, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{file, "--force"}, "snapshot", "export", snap, file)
	sameBytes(t, "the file", readAt(t, file, 0, 8), []byte("precious"))
	h.ok("snapshot", "export", "--force", snap, file)
	sameBytes(t, "the export", readAt(t, file, 0, mib), disk)

	device := loopDevice(t, writeImage(t, filepath.Join(h.dir, "device.img"), randomBytes(2, 2*mib)))
	h.fails(4, []string{device, "--force"}, "snapshot", "export", snap, device)
	h.ok("snapshot", "export", "--force", snap, device)
	sameBytes(t, "the device", readAt(t, device, 0, mib), disk)
	small := loopDevice(t, sparse(t, filepath.Join(h.dir, "small.img"), 512*kib))
	h.fails(4, nil, "snapshot", "export", "--force", snap, small)
}

func TestVerifyNamesDamage(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 4*mib)))
	if out := h.ok("snapshot", "verify", "--all"); out != snap+" ok" {
		t.Errorf("verify printed %q", out)
	}
	s := h.own
	s.damaged()
	for key, size := range s.objects(t, filepath.Join("data", snap, "packs")) {
		path := filepath.Join(s.files, key)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		data[size/2] ^= 1
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := h.run("snapshot", "verify", snap)
	if r.code != 1 || !strings.Contains(r.stdout, "problem") || !strings.Contains(r.stderr, "block") {
		t.Errorf("%s\nwant exit 1 and the block named", r)
	}
	m := h.mount(snap, "--read-deadline", "5s")
	f := m.open(os.O_RDONLY)
	if _, err := f.ReadAt(make([]byte, 4*mib), 0); err == nil {
		t.Error("a read of damaged data succeeded")
	}
	if errs := m.status().Errors; len(errs) == 0 {
		t.Error("status.json tells nothing of it")
	}
	if r := h.run("snapshot", "export", snap, filepath.Join(h.dir, "out.img")); r.code != 1 {
		t.Errorf("%s\nwant exit 1", r)
	}
	if left := glob(t, filepath.Join(h.dir, "*out.img*")); len(left) != 0 {
		t.Errorf("the failed export left %v", left)
	}
}
