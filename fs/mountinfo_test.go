package fs

import (
	"os"
	"testing"
)

func TestParseMountinfo(t *testing.T) {
	for _, c := range []struct {
		line string
		want mountPoint
		ok   bool
	}{
		{"36 35 0:52 / /mnt rw,nosuid - fuse.lazyvol lazyvol:vol-1 rw,user_id=0\n",
			mountPoint{36, "0:52", "/mnt", "fuse.lazyvol", "lazyvol:vol-1"}, true},
		{`36 35 0:52 / /a\040b\134c\011 rw shared:1 master:7 - fuse.x with\040space rw`,
			mountPoint{36, "0:52", "/a b\\c\t", "fuse.x", "with space"}, true},
		{"36 35 0:52 / /- rw - - - -", mountPoint{36, "0:52", "/-", "-", "-"}, true},
		{`36 35 0:52 / /a\04 rw - x y z`, mountPoint{36, "0:52", `/a\04`, "x", "y"}, true},
		{"", mountPoint{}, false},
		{"36 35 0:52 / /mnt rw fuse.lazyvol lazyvol rw", mountPoint{}, false},
		{"36 35 0:52 / /mnt rw -", mountPoint{}, false},
		{"x 35 0:52 / /mnt rw - a b c", mountPoint{}, false},
	} {
		got, err := parseMountinfo(c.line)
		if (err == nil) != c.ok || got != c.want {
			t.Errorf("%q gives %+v, %v", c.line, got, err)
		}
	}
}

func FuzzParseMountinfo(f *testing.F) {
	lines, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(lines))
	f.Add(`36 35 0:52 / /a\040b rw shared:1 - fuse.lazyvol lazyvol:vol-1 rw`)
	f.Fuzz(func(t *testing.T, line string) {
		if m, err := parseMountinfo(line); err == nil && (m.dev == "" || m.fsType == "") {
			t.Errorf("%q gives %+v", line, m)
		}
	})
}

func TestMountAtFindsMounts(t *testing.T) {
	for dir, want := range map[string]mountPoint{
		"/proc":      {path: "/proc", fsType: "proc"},
		"/proc/self": {path: "/proc", fsType: "proc"}, // a symbolic link, below it
	} {
		m, path, err := mountAt(dir)
		if err != nil || m.path != want.path || m.fsType != want.fsType {
			t.Errorf("%s is on %+v, %v", dir, m, err)
		}
		if dir == "/proc" && path != dir {
			t.Errorf("%s is called %s", dir, path)
		}
		if again, ok, err := mountByID(m.id); !ok || err != nil || again != m {
			t.Errorf("mount %d is %+v, %t, %v", m.id, again, ok, err)
		}
	}
	if _, ok, err := mountByID(-1); ok || err != nil {
		t.Errorf("a mount nobody has: %t, %v", ok, err)
	}
}
