package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The tree has a deleted parent's children below its own parent while that is in the
// recycle bin, and below the lineage when it is gone for good. A diff is for people
// only where they ask for it or sit at a terminal.
func TestTreeAndDiffAreForPeople(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 4*mib)
	first := h.ok("snapshot", "create", "--tag", "Name=base", h.image(disk))
	copy(disk[2*mib:], randomBytes(2, blockSize))
	second := h.ok("snapshot", "create", "--parent", first, "--description", "nightly", h.image(disk))
	copy(disk[3*mib:], randomBytes(3, blockSize))
	third := h.ok("snapshot", "create", "--parent", second, h.image(disk))
	other := h.ok("snapshot", "create", h.image(randomBytes(4, mib)))
	tree := func(want ...string) {
		t.Helper()
		lines := strings.Split(h.ok("snapshot", "tree", "--unique"), "\n")
		if len(lines) != len(want) {
			t.Fatalf("got\n%s\nwant %d lines", strings.Join(lines, "\n"), len(want))
		}
		for i, line := range lines {
			for part := range strings.SplitSeq(want[i], "|") {
				if !strings.Contains(line, part) {
					t.Errorf("line %d of\n%s\nlacks %q", i, strings.Join(lines, "\n"), part)
				}
			}
		}
	}
	lineage := func(snap string) string { return "lineage " + snap[len("snap-"):len("snap-")+8] + ", not encrypted" }
	frees := func(snap string) string {
		out := h.ok("snapshot", "show", snap)
		for line := range strings.Lines(out) {
			if value, ok := strings.CutPrefix(line, "freed if deleted:"); ok {
				return "frees " + strings.TrimSpace(value)
			}
		}
		t.Fatalf("show does not tell what deleting it would free: %s", out)
		return ""
	}
	tree(lineage(first), "└─ "+first+" |4.0 MiB|stored 4.|"+frees(first)+"|base", "   ↓ "+second+"|nightly", "   ↓ "+third+"|"+frees(third),
		lineage(other), "└─ "+other+" |"+frees(other))

	h.ok("snapshot", "delete", "--retain", "1h", second)
	tree(lineage(first), "└─ "+first, "   ↓ "+third+"|(parent "+second+" is not listed)", lineage(other), "└─ "+other)
	h.ok("snapshot", "restore-deleted", second)
	h.ok("snapshot", "delete", second)
	tree(lineage(first), "├─ "+first, "└─ "+third+"|(parent "+second+" is not listed)", lineage(other), "└─ "+other)

	plain := fmt.Sprintf("%d %d\n%d %d", 2*mib, blockSize, 3*mib, blockSize)
	if out := h.ok("snapshot", "diff", first, third); out != plain {
		t.Errorf("for scripts: %q, want %q", out, plain)
	}
	human := h.ok("snapshot", "diff", "--human", first, third)
	if !strings.Contains(human, "2.0 MiB") || !strings.HasSuffix(human, "\n2 ranges, 1.0 MiB of 4.0 MiB: 25.00% of the device") {
		t.Errorf("for people: %q", human)
	}
	if out := h.onTerminal("snapshot", "diff", first, third); strings.TrimSpace(out) != strings.TrimSpace(human) {
		t.Errorf("on a terminal: %q, want %q", out, human)
	}
	if out := h.onTerminal("snapshot", "diff", "--human=false", first, third); strings.TrimSpace(out) != plain {
		t.Errorf("on a terminal, though not wanted: %q, want %q", out, plain)
	}
	if r := h.run("snapshot", "diff", "--human", "--json", first, third); r.code != 2 || !strings.Contains(r.stderr, "InvalidParameterCombination") {
		t.Errorf("both forms at once: %s", r)
	}
}

// onTerminal returns what lazyvol, which must succeed, prints on a terminal.
func (h *host) onTerminal(args ...string) string {
	h.t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer master.Close()
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		h.t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		h.t.Fatal(err)
	}
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := h.command(ctx, args...)
	cmd.Stdout = terminal
	err = cmd.Run()
	if err := errors.Join(err, terminal.Close()); err != nil {
		h.t.Fatalf("%q on a terminal: %v", args, err)
	}
	out, err := io.ReadAll(master)
	if err != nil && !errors.Is(err, unix.EIO) { // how a terminal that everybody closed ends
		h.t.Fatal(err)
	}
	return strings.ReplaceAll(string(out), "\r\n", "\n")
}
