package integration

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPackageInstallsOnACleanRoot(t *testing.T) {
	t.Parallel()
	root := newDebianRoot(t)
	root.add(makePackage(t), "lazyvol.deb")

	root.ok("dpkg -i /lazyvol.deb")
	commit, err := exec.Command("git", "rev-parse", "HEAD").Output()
	if err != nil {
		t.Fatal(err)
	}
	if out := root.ok("lazyvol version --json"); !strings.Contains(out, strings.TrimSpace(string(commit))) || strings.Contains(out, "devel") {
		t.Errorf("the version does not tell commit %s: %s", commit, out)
	}
	root.ok("zcat /usr/share/man/man1/lazyvol-snapshot-create.1.gz | grep -q freeze")
	if out := root.ok("bash -c '. /usr/share/bash-completion/completions/lazyvol; complete -p lazyvol'"); !strings.Contains(out, "lazyvol") {
		t.Errorf("completion: %s", out)
	}
	root.ok(`units=$(ls /usr/lib/systemd/system/lazyvol*)
		for file in $(sed -n 's/^Exec[A-Za-z]*=[-+@!]*\(\/[^ ]*\).*/\1/p' $units); do test -x "$file"; done`)

	// It works with nothing but what it depends on.
	root.ok("head -c 3000000 /dev/urandom | head -c 2999808 >disk.img && mkdir -p /mnt/old")
	snap := root.ok("lazyvol snapshot create disk.img")
	root.ok("lazyvol mount " + snap + " /mnt/old && cmp disk.img /mnt/old/volume.img")

	// Who takes it away in use would be left with a mount that nothing can unmount.
	if out, err := root.sh("dpkg --remove lazyvol"); err == nil || !strings.Contains(out, "/mnt/old") {
		t.Errorf("removed in use: %v\n%s", err, out)
	}
	root.ok("dpkg -i /lazyvol.deb && cmp disk.img /mnt/old/volume.img && dpkg-query --show lazyvol")

	// What serves nothing is stopped: timers would fail each day, and the exporter go on. In
	// the place of systemctl, as nothing is booted here, is what notes its arguments.
	root.ok("lazyvol unmount /mnt/old && mkdir -p /run/systemd/system")
	root.ok("printf '#!/bin/sh\\necho $*\\n' >/usr/bin/systemctl && chmod +x /usr/bin/systemctl")
	if out := root.ok("dpkg -i /lazyvol.deb"); strings.Contains(out, "stop") {
		t.Errorf("an upgrade stops something: %s", out)
	}
	if out := root.ok("dpkg --remove lazyvol"); !strings.Contains(out, "stop lazyvol-snapshot@*.timer lazyvol-snapshot@*.service lazyvol-metrics.service") {
		t.Errorf("units are not stopped: %s", out)
	}
	root.ok("rm -r /usr/bin/systemctl /run/systemd && dpkg -i /lazyvol.deb")
	if out := root.ok("dpkg --purge lazyvol 2>&1"); !strings.Contains(out, "/var/lib/lazyvol") {
		t.Errorf("nobody is told what a purge leaves: %s", out)
	}
	root.ok("test -d /var/lib/lazyvol/store/data")
	if out := root.ok("find /usr /etc -name '*lazyvol*' ! -path '/usr/lib/*/perl*'"); out != "" {
		t.Errorf("a purge leaves %s", out)
	}
}

// makePackage returns the path of the Debian package for this machine, made from
// the sources as they are.
func makePackage(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*commandTimeout)
	defer cancel()
	dist := filepath.Join(t.TempDir(), "dist")
	cmd := exec.CommandContext(ctx, "../scripts/dist", runtime.GOARCH)
	cmd.Env = append(os.Environ(), "DIST="+dist)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("scripts/dist: %v\n%s", err, out)
	}
	found, err := filepath.Glob(filepath.Join(dist, "*.deb"))
	if err != nil || len(found) != 1 {
		t.Fatalf("packages: %v %v", found, err)
	}
	return found[0]
}

// A debianRoot is a folder with a Debian in it that has what lazyvol's package
// depends on, and nothing else.
type debianRoot struct {
	t   *testing.T
	dir string
}

func newDebianRoot(t *testing.T) debianRoot {
	t.Helper()
	archive := os.Getenv("LAZYVOL_DEBIAN_ROOT")
	if archive == "" {
		t.Fatal("LAZYVOL_DEBIAN_ROOT must name the archive of a Debian root: run 'make tools', or the tests through make")
	}
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "tar", "-xf", archive, "-C", dir, "--exclude=./dev/*").CombinedOutput(); err != nil {
		t.Fatalf("unpack %s: %v\n%s", archive, err, out)
	}
	for _, name := range []string{"dev", "proc"} {
		at := filepath.Join(dir, name)
		if err := unix.Mount("/"+name, at, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			t.Fatalf("give the root its /%s: %v", name, err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
				t.Errorf("take the root its /%s: %v", name, err)
			}
		})
	}
	root := debianRoot{t, dir}
	t.Cleanup(func() { // of a failed test
		if t.Failed() {
			_, _ = root.sh("lazyvol unmount /mnt/old")
		}
	})
	return root
}

// add puts a file into the root.
func (r debianRoot) add(path, name string) {
	r.t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(filepath.Join(r.dir, name), data, 0o644)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// sh runs a script in the root, and returns all that it prints.
func (r debianRoot) sh(script string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-euc", script)
	cmd.Dir = "/root"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "AWS_EC2_METADATA_DISABLED=true"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: r.dir}
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		out = append(out, exit.Stderr...)
	}
	return strings.TrimSpace(string(out)), err
}

func (r debianRoot) ok(script string) string {
	r.t.Helper()
	out, err := r.sh(script)
	if err != nil {
		r.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}
