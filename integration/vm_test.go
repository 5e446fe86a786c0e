package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bootPatience bounds one boot, from the start of qemu to its end. It takes some 20
// seconds, all of them on one core: there is no KVM where these tests must run.
const bootPatience = 4 * time.Minute

// guestFolder makes the guest of these tests unless this machine has it, and returns
// the folder with disk.img, vmlinuz and initrd.img.
var guestFolder = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cmd := exec.Command("../scripts/vm-image", filepath.Join(cache, "lazyvol-tools"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("make the guest: %w\n%s", err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
})

// A guest is a virtual machine's kernel, where any user may read it, and its disk.
type guest struct {
	t               testing.TB
	disk            string
	kernel, initial string
}

func newGuest(t testing.TB) *guest {
	t.Helper()
	from, err := guestFolder()
	if err != nil {
		t.Fatal(err)
	}
	dir := publicDir(t)
	g := &guest{t: t, disk: filepath.Join(from, "disk.img"), kernel: filepath.Join(dir, "vmlinuz"), initial: filepath.Join(dir, "initrd.img")}
	for _, to := range []string{g.kernel, g.initial} {
		data, err := os.ReadFile(filepath.Join(from, filepath.Base(to)))
		if err == nil {
			err = os.WriteFile(to, data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// needless are units that take an emulated processor a third of its time, and have
// nothing to do with disks.
var needless = []string{
	"systemd-udev-trigger.service", "systemd-journal-flush.service", "systemd-update-utmp.service",
	"modprobe@configfs.service", "modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service",
	"dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
}

// without is what a kernel's command line says for systemd to leave units out.
func without(units ...string) string {
	var words strings.Builder
	for _, unit := range units {
		words.WriteString(" systemd.mask=" + unit)
	}
	return words.String()
}

// A boot is what a guest did from when it was started until it powered off.
type boot struct {
	up      time.Duration // until multi-user.target was reached
	waited  time.Duration // of that, while the guest waited for the store
	status  status        // when it was reached
	console []string      // what the guest said of itself
}

// boot boots the guest from a mounted volume, as the user that owns the file, has it
// write a word into its file and waits until it has powered off.
func (g *guest) boot(m *mount, word string) boot {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-accel", "tcg", "-m", "512",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", g.kernel, "-initrd", g.initial, "-append", "root=/dev/vda rw console=ttyS0 guest.write="+word+without(needless...),
		"-drive", "file="+m.image+",format=raw,if=virtio,cache=none,aio="+asynchronous()+",discard=unmap")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.WaitDelay = 5 * time.Second
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	console, err := cmd.StdoutPipe()
	if err != nil {
		g.t.Fatal(err)
	}
	began, before := time.Now(), m.status()
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	var b boot
	var all bytes.Buffer
	lines := bufio.NewScanner(io.TeeReader(console, &all))
	for lines.Scan() {
		_, said, ok := strings.Cut(strings.TrimSpace(lines.Text()), "guest: ")
		if !ok {
			continue
		}
		b.console = append(b.console, said)
		if strings.HasSuffix(said, "multi-user.target is active") {
			b.up, b.status = time.Since(began), m.status()
			b.waited = time.Duration((b.status.DemandWait - before.DemandWait) * float64(time.Second))
		}
	}
	if err := errors.Join(lines.Err(), cmd.Wait(), ctx.Err()); err != nil || b.up == 0 {
		g.t.Fatalf("qemu after %s: %v\n%s\nThe guest's console:\n%s", time.Since(began), err, complaints.Bytes(), all.Bytes())
	}
	return b
}

// asynchronous is how qemu reads and writes: by io_uring where the kernel lets it.
func asynchronous() string {
	if off, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); err == nil && strings.TrimSpace(string(off)) == "0" {
		return "io_uring"
	}
	return "threads"
}

// said checks what a guest said of itself, besides how long it took.
func (b boot) said(t testing.TB, want ...string) {
	t.Helper()
	if got := strings.Join(b.console[1:], "\n"); got != strings.Join(want, "\n") {
		t.Errorf("the guest said:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

func (b boot) String() string {
	return fmt.Sprintf("multi-user after %.1f s, of which %.2f s (%.1f %%) waiting for the store in %d reads; %d MiB of %d fetched",
		b.up.Seconds(), b.waited.Seconds(), 100*b.waited.Seconds()/b.up.Seconds(), b.status.DemandWaits, b.status.HydratedBytes/mib, b.status.TotalBytes/mib)
}

// mountFor mounts a new volume of a snapshot for qemu, on a host that has nothing of
// it yet.
func (h *host) mountFor(snap string, flags ...string) (vol string, m *mount) {
	h.t.Helper()
	vol = h.ok("volume", "create", "--snapshot", snap)
	dir := filepath.Join(publicDir(h.t), "disk")
	if err := os.Mkdir(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	return vol, h.mountOn(dir, vol, append(flags, "--allow-other", fmt.Sprintf("--uid=%d", nobody), fmt.Sprintf("--gid=%d", nobody))...)
}

// A virtual machine boots from a snapshot of which its host has nothing, as a user of
// its own whom alone the disk is open to. What it writes is a small increment, from
// which it boots on another host. What it read is recorded, and lets yet another one
// boot without waiting.
func TestVMBootsFromAColdSnapshot(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	near := newS3Store(t)
	far, network := near.behindNetwork(t)
	network.Suffer(t, toxic("latency", "downstream", "latency", 20))
	whole := newHost(t, near).ok("snapshot", "create", g.disk)
	stored := near.dataBytes(t)

	h := newHost(t, far)
	// Hydrated, this small image would all be here before the guest first reads of it.
	vol, m := h.mountFor(whole, "--record-trace", "boot", "--no-hydrate")
	for uid, want := range map[uint32]error{nobody: nil, nobody - 1: unix.EACCES} {
		err := asUser(uid, func() error {
			f, err := os.OpenFile(m.image, os.O_RDWR|oDirect, 0)
			if err == nil {
				err = f.Close()
			}
			return err
		})
		if !errors.Is(err, want) {
			t.Errorf("user %d opens the disk: %v, want %v", uid, err, want)
		}
	}
	cold := g.boot(m, "first")
	t.Logf("cold: %s", cold)
	cold.said(t, "file is not there", "the image is whole", `wrote "first"`)
	changed := h.ok("snapshot", "create", vol)
	if n := near.dataBytes(t) - stored; n > stored/10 {
		t.Errorf("the increment takes %d bytes beside the image's %d", n, stored)
	}
	m.unmount() // and the trace is stored

	_, m = newHost(t, far).mountFor(whole, "--trace", "boot", "--no-hydrate")
	traced := g.boot(m, "traced")
	t.Logf("traced: %s", traced)
	traced.said(t, "file is not there", "the image is whole", `wrote "traced"`)

	_, m = newHost(t, far).mountFor(changed)
	again := g.boot(m, "second")
	t.Logf("from the increment, hydrated meanwhile: %s", again)
	again.said(t, `file holds "first"`, "the image is whole", `wrote "second"`)

	// How long a boot takes is the processor's affair, and how long it waits with neither a
	// hydrator nor a trace the network's: of their ratio nothing can be said here.
	if cold.status.DemandWaits == 0 || cold.waited <= 0 || cold.waited > cold.up {
		t.Errorf("the guest waited for %s of %s in %d reads, all of what it read being in the store", cold.waited, cold.up, cold.status.DemandWaits)
	}
	if traced.status.DemandWaits > cold.status.DemandWaits/10 {
		t.Errorf("%d reads waited although what they read was fetched in order, and %d without that", traced.status.DemandWaits, cold.status.DemandWaits)
	}
	for _, b := range []struct {
		what string
		boot
		most float64
	}{{"hydrated meanwhile", again, 0.2}, {"traced", traced, 0.05}} {
		if share := b.waited.Seconds() / b.up.Seconds(); share > b.most {
			t.Errorf("%s, the guest waited for the store for %.3f of its boot, want %g at most: %s", b.what, share, b.most, b)
		}
	}
}
