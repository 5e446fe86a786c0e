package integration

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// mapJSON is what 'snapshot map --json' prints.
type mapJSON struct {
	ID        string     `json:"id"`
	Root      string     `json:"root"`
	Size      int64      `json:"size"`
	BlockSize int64      `json:"blockSize"`
	Ranges    []mapRange `json:"ranges"`
}

type mapRange struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Owner  string `json:"owner"`
	Cached bool   `json:"cached"`
	Dirty  string `json:"dirty"`
}

func (h *host) mapOf(target string) mapJSON {
	h.t.Helper()
	return parse[mapJSON](h.t, h.ok("snapshot", "map", "--json", target))
}

// The map of a volume says of every byte which snapshot uploaded it, whether it is here,
// and what was done since, whether the volume is mounted or not; that of a snapshot what
// the host has of it. Pictures are made of the same.
func TestMapShowsWhoOwnsWhatIsCachedAndWhatIsDirty(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := make([]byte, 8*mib+pageSize)
	copy(disk, randomBytes(1, 2*mib))
	copy(disk[6*mib:], randomBytes(2, blockSize))
	first := h.ok("snapshot", "create", "--tag", "Name=<first> & only", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", first)
	m := h.mount(vol, "--no-hydrate", "--read-ahead=0")
	m.write(randomBytes(3, blockSize), blockSize)
	m.write(randomBytes(4, pageSize), 3*blockSize+5*pageSize)
	second := h.ok("snapshot", "create", vol)
	m.unmount()

	restored := h.ok("volume", "create", "--snapshot", second)
	m = h.mount(restored, "--no-hydrate", "--read-ahead=0")
	f := m.open(os.O_RDWR | syscall.O_DIRECT)
	readDirect(t, f, blockSize+3*pageSize, pageSize)
	for _, off := range []int64{2 * blockSize, 4 * mib} {
		if _, err := f.WriteAt(aligned(pageSize), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 6*mib, 128*kib); err != nil {
		t.Fatal(err)
	}
	want := mapJSON{ID: restored, Root: second, Size: int64(len(disk)), BlockSize: blockSize, Ranges: []mapRange{
		{0, blockSize, first, false, ""},
		{blockSize, blockSize, second, true, ""},
		{2 * blockSize, pageSize, first, false, "data"},
		{2*blockSize + pageSize, blockSize - pageSize, first, false, ""},
		{3 * blockSize, blockSize, second, false, ""},
		{2 * mib, 2 * mib, "", false, ""},
		{4 * mib, pageSize, "", false, "data"},
		{4*mib + pageSize, 2*mib - pageSize, "", false, ""},
		{6 * mib, 128 * kib, first, false, "zero"},
		{6*mib + 128*kib, blockSize - 128*kib, first, false, ""},
		{6*mib + blockSize, 2*mib - blockSize + pageSize, "", false, ""},
	}}
	// What was read is kept after its reader has it.
	waitFor(t, "a block is cached", 20*time.Second, func() bool { return m.status().HydratedBytes == blockSize })
	if diff := cmp.Diff(want, h.mapOf(restored)); diff != "" {
		t.Errorf("while it is mounted (-want +got):\n%s", diff)
	}
	text := h.onTerminal("snapshot", "map", restored)
	for _, part := range []string{"  #  written", "  -  discarded", "  A  " + first, "  B  " + second, "<first> & only", "       0 B  "} {
		if !strings.Contains(text, part) {
			t.Errorf("on a terminal there is no %q:\n%s", part, text)
		}
	}
	if out := h.ok("snapshot", "map", "--text", restored); out != strings.TrimSuffix(text, "\n") {
		t.Errorf("with --text, elsewhere:\n%s\non a terminal:\n%s", out, text)
	}
	m.unmount()
	if diff := cmp.Diff(want, h.mapOf(restored)); diff != "" {
		t.Errorf("when it is not mounted (-want +got):\n%s", diff)
	}
	h.checkPicture(restored, first, second, "<first> & only")

	want.ID = second
	want.Ranges = []mapRange{
		{0, blockSize, first, false, ""},
		{blockSize, blockSize, second, true, ""},
		{2 * blockSize, blockSize, first, false, ""},
		{3 * blockSize, blockSize, second, false, ""},
		{2 * mib, 4 * mib, "", false, ""},
		{6 * mib, blockSize, first, false, ""},
		{6*mib + blockSize, 2*mib - blockSize + pageSize, "", false, ""},
	}
	if diff := cmp.Diff(want, h.mapOf(second)); diff != "" {
		t.Errorf("of its snapshot (-want +got):\n%s", diff)
	}
	h.checkPicture(second, first, second)
	elsewhere := newHost(t, h.store)
	want.Ranges[1].Cached = false
	if diff := cmp.Diff(want, elsewhere.mapOf(second)); diff != "" {
		t.Errorf("on another host (-want +got):\n%s", diff)
	}
	if left, err := filepath.Glob(filepath.Join(elsewhere.state, "bases", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("the map left %q on it: %v", left, err)
	}

	h.ok("snapshot", "delete", first)
	if out := h.ok("snapshot", "map", "--text", second); !strings.Contains(out, "  A  "+first+"  deleted ") {
		t.Errorf("of one whose parent was deleted:\n%s", out)
	}
	blank := h.ok("volume", "create", "--size", "1MiB")
	if diff := cmp.Diff(mapJSON{ID: blank, Size: mib, BlockSize: blockSize, Ranges: []mapRange{{Length: mib}}}, h.mapOf(blank)); diff != "" {
		t.Errorf("of a blank volume (-want +got):\n%s", diff)
	}
}

// checkPicture checks that the picture is XML and has some texts, in a file as on stdout.
func (h *host) checkPicture(target string, texts ...string) {
	h.t.Helper()
	file := filepath.Join(h.dir, target+".svg")
	if out := h.ok("snapshot", "map", "-o", file, target); out != "" {
		h.t.Errorf("beside the file it printed %q", out)
	}
	picture, err := os.ReadFile(file)
	if err != nil {
		h.t.Fatal(err)
	}
	if out := h.ok("snapshot", "map", target); out+"\n" != string(picture) {
		h.t.Errorf("on stdout it is another picture:\n%s\nin the file:\n%s", out, picture)
	}
	var svg struct {
		XMLName xml.Name
		Title   string   `xml:"title"`
		Texts   []string `xml:"text"`
	}
	if err := xml.Unmarshal(picture, &svg); err != nil {
		h.t.Fatalf("%v\n%s", err, picture)
	}
	if svg.XMLName.Local != "svg" || svg.Title != "Map of "+target {
		h.t.Errorf("it is a %s with the title %q", svg.XMLName.Local, svg.Title)
	}
	for _, text := range texts {
		if !slices.Contains(svg.Texts, text) {
			h.t.Errorf("it does not say %q:\n%s", text, picture)
		}
	}
}

func TestMapRefusesWhatItCannotDraw(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	file := filepath.Join(h.dir, "map.svg")
	vol := h.ok("volume", "create", "--size", "1MiB")
	h.fails(2, []string{"exclude each other", "InvalidParameterCombination"}, "snapshot", "map", "-o", file, "--text", vol)
	if r := h.run("snapshot", "map", "--text", "--json", vol); r.code != 2 || r.stdout != "" || !strings.Contains(r.stderr, "exclude each other") {
		t.Errorf("two forms at once: %s", r)
	}
	h.fails(2, []string{"neither a snapshot"}, "snapshot", "map", h.dir)
	h.fails(2, []string{"InvalidVolumeID.Malformed"}, "snapshot", "map", "vol-1")
	h.fails(3, []string{"InvalidVolume.NotFound"}, "snapshot", "map", "-o", file, "vol-0123456789abcdef0")
	h.fails(3, []string{"InvalidSnapshot.NotFound"}, "snapshot", "map", "-o", file, "snap-1a2b3c4d567890abc")
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("one of these left a picture: %v", err)
	}
	h.fails(1, []string{"no such file or directory"}, "snapshot", "map", "-o", filepath.Join(h.dir, "none", "map.svg"), vol)
}
