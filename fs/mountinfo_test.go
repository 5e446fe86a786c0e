package fs

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestParseMountinfo(t *testing.T) {
	for _, c := range []struct {
		line string
		want mountPoint
		ok   bool
	}{
		{"36 35 0:52 / /mnt rw,nosuid - fuse.lazyvol lazyvol:vol-1 rw,user_id=7,group_id=0\n",
			mountPoint{36, "0:52", "/mnt", "fuse.lazyvol", "lazyvol:vol-1", 7, 35}, true},
		{`36 35 0:52 / /a\040b\134c\011 rw shared:1 master:7 - fuse.x with\040space rw`,
			mountPoint{36, "0:52", "/a b\\c\t", "fuse.x", "with space", -1, 35}, true},
		{"36 35 0:52 / /- rw - - - -", mountPoint{36, "0:52", "/-", "-", "-", -1, 35}, true},
		{`36 35 0:52 / /a\04 rw - x y z`, mountPoint{36, "0:52", `/a\04`, "x", "y", -1, 35}, true},
		{"36 35 0:52 / /empty rw - tmpfs  rw", mountPoint{36, "0:52", "/empty", "tmpfs", "", -1, 35}, true},
		{"", mountPoint{}, false},
		{"36 35 0:52 / /mnt rw fuse.lazyvol lazyvol rw", mountPoint{}, false},
		{"36 35 0:52 / /mnt rw - a b", mountPoint{}, false},
		{"36 35 0:52 / /mnt rw - a b user_id=x", mountPoint{}, false},
		{"x 35 0:52 / /mnt rw - a b c", mountPoint{}, false},
		{"36 x 0:52 / /mnt rw - a b c", mountPoint{}, false},
	} {
		got, err := parseMountinfo(c.line)
		if (err == nil) != c.ok || got != c.want {
			t.Errorf("%q gives %+v, %v", c.line, got, err)
		}
	}
}

// Whatever a path is called, it is found again as the kernel writes it
// (mangle_path in fs/seq_file.c); whatever else a line holds, it does no harm.
func FuzzParseMountinfo(f *testing.F) {
	lines, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(lines)) {
		f.Add(line)
	}
	f.Add("/a b\\c\t\n040")
	mangle := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := parseMountinfo(s); err != nil && !strings.Contains(err.Error(), "mountinfo") {
			t.Errorf("%q gives %v", s, err)
		}
		want := mountPoint{id: 36, dev: "0:52", path: s, fsType: fsType, source: s, uid: 1, parent: 35}
		line := fmt.Sprintf("36 35 0:52 / %s rw - fuse.lazyvol %[1]s rw,user_id=1\n", mangle.Replace(s))
		if got, err := parseMountinfo(line); err != nil || got != want {
			t.Errorf("%q gives %+v, %v", line, got, err)
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
