package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// The commands of the pages are run as they are written. Of a page of docs/ these are the
// blocks that the line "<!-- run -->" stands before, as one story: variables go from one
// to the next. Of README.md, which shows more than can be done here, it is every block
// below "Use it", with what readmeStory puts in the place of examples.
//
// A story has a machine nearly for itself: /etc, /mnt, /srv, /run/vm, the state directory
// and the home directory are its own, it is root, "disk.img" in its working directory is an ext4
// filesystem, and AWS is a server that has the buckets my-bucket and backup, under other
// names: the story says them as the page does.

// storyTime bounds a story.
const storyTime = 2 * time.Minute

// storyStart is what happens before a story. A failure of any command ends it.
const storyStart = `set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/.etc /mnt/.work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/.etc,workdir=/mnt/.work /etc
# Copies of what other tests have mounted would keep it in use.
awk -v below="$SANDBOX/" 'index($2, below) == 1 { print $2 }' /proc/mounts | tac | while read -r dir; do umount -l "$dir" || true; done
for dir in /srv /run/vm; do mkdir -p $dir; mount -t tmpfs -o mode=755 tmpfs $dir; done
mkdir -p ~/.aws
printf '[profile backup]\nregion = us-east-1\nendpoint_url = %s\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
  "$AWS_ENDPOINT_URL" "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" > ~/.aws/config
truncate -s 24M disk.img
mkfs.ext4 -q disk.img
# Whatever becomes of it, nothing is left mounted or attached.
finish() {
  set +ex
  losetup --list --noheadings --output NAME,BACK-FILE | while read -r dev file; do
    case "$file" in "$HOME"/*) umount "$dev" 2>/dev/null; losetup --detach "$dev" ;; esac
  done
  awk '$3 == "fuse.lazyvol" { print $2 }' /proc/mounts | while read -r dir; do
    case "$dir" in /mnt/*|/srv/*|/run/vm/*|"$HOME"/*) lazyvol unmount "$dir" || umount -l "$dir" ;; esac
  done
}
trap finish EXIT
`

// tell runs a story on a machine of its own, and fails the test with all that it said if
// a command of it fails.
func tell(t *testing.T, story string) {
	t.Helper()
	server := blockstoretest.StartVersitygw(t)
	home := t.TempDir()
	bin := filepath.Join(home, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(lazyvol(t, false), filepath.Join(bin, "lazyvol")); err != nil {
		t.Fatal(err)
	}
	for _, bucket := range []string{"my-bucket", "backup"} {
		story = regexp.MustCompile(`s3://`+bucket+`\b`).ReplaceAllString(story, "s3://"+server.NewBucket(t))
	}
	ctx, cancel := context.WithTimeout(t.Context(), storyTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "bash", "-s")
	cmd.Dir = home
	cmd.Stdin = strings.NewReader(storyStart + "set -x\n" + story)
	cmd.Env = append([]string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + home, "TMPDIR=" + home, "SANDBOX=" + os.TempDir(), "LAZYVOL_STATE=" + filepath.Join(home, "state")},
		withoutFiles(server.Env())...)
	cmd.WaitDelay = 5 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// withoutFiles leaves out that there are no configuration files: a story has its own.
func withoutFiles(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(s string) bool {
		return strings.HasPrefix(s, "AWS_CONFIG_FILE=") || strings.HasPrefix(s, "AWS_PROFILE=") || strings.HasPrefix(s, "AWS_SHARED_CREDENTIALS_FILE=")
	})
}

// A block is a fenced block of a page.
type block struct {
	heading string // above it
	script  string
	run     bool // marked to be run
	sh      bool
}

var pageParts = regexp.MustCompile("(?ms)^(#+ [^\n]*)$|((?:^<!-- run -->\n)?)^```([^\n]*)\n(.*?)^```$")

func blocksOf(t testing.TB, path string) (blocks []block) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	heading := ""
	for _, m := range pageParts.FindAllStringSubmatch(string(data), -1) {
		if m[1] != "" {
			heading = strings.TrimLeft(m[1], "# ")
			continue
		}
		blocks = append(blocks, block{heading, m[4], m[2] != "", m[3] == "sh"})
	}
	return blocks
}

func TestPagesRunAsWritten(t *testing.T) {
	t.Parallel()
	paths := glob(t, "../docs/*.md")
	told := 0
	for _, path := range paths {
		var story strings.Builder
		for _, b := range blocksOf(t, path) {
			if b.run && !b.sh {
				t.Errorf("%s, %s: a block to run is no sh", path, b.heading)
			}
			if b.run {
				story.WriteString(b.script)
			}
		}
		if story.Len() == 0 {
			continue
		}
		told++
		t.Run(filepath.Base(path), func(t *testing.T) {
			t.Parallel()
			tell(t, story.String())
		})
	}
	if told == 0 {
		t.Error("no page has anything to run")
	}
}

// An edit makes an example of the README one that is there.
type edit struct{ from, to string }

// readmeStory says, by heading, what is put in the place of examples of the README.
var readmeStory = map[string][]edit{
	"With your own bucket": {{"/dev/vg0/data-frozen", "disk.img"}},
	"As a loop device":     {{"\n…\n", "\necho hello > /mnt/data/file\n"}},
	"In a VM":              {{"qemu-system-x86_64 …[^\n]*\n", "test -s /run/vm/disk0/volume.img\n"}},
	"Encrypted":            {{"(lazyvol snapshot create --key[^\n]*)", "sealed=$$($1\n)"}, {"shred 1a2b3c4d", "shred --yes $${sealed:5:8}"}},
	"In another place":     {{"region=eu-west-1", "region=us-east-1"}},
	"Seeing what is there": {{"status --watch", "status"}},
}

func TestReadmeRunsAsWritten(t *testing.T) {
	t.Parallel()
	var story strings.Builder
	seen := make(map[string]bool)
	for _, b := range blocksOf(t, "../README.md") {
		if !b.sh {
			continue
		}
		seen[b.heading] = true
		script := b.script
		for _, e := range readmeStory[b.heading] {
			script = regexp.MustCompile(e.from).ReplaceAllString(script, e.to)
		}
		fmt.Fprintf(&story, "echo '%s'\n%s\n", strings.ReplaceAll(b.heading, "'", ""), script)
	}
	for heading := range readmeStory {
		if !seen[heading] {
			t.Errorf("README.md has nothing to run under %q any more", heading)
		}
	}
	tell(t, story.String())
}
