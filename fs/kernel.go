package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// helperTime bounds a run of fusermount3, which may hang on a path.
const helperTime = 30 * time.Second

// mountOptions is what the kernel is told about a mount.
type mountOptions struct {
	source     string
	readOnly   bool
	allowOther bool
	maxRead    int // bytes per READ request
}

// connect mounts on dir and returns the connection: /dev/fuse, opened for this
// mount, with the kernel's INIT request waiting in it. The mount is dead as soon
// as nobody has the connection open, so no child process may inherit it, not
// even one forked this very moment.
//
// Root mounts by itself. Others need fusermount3, which is setuid root.
func connect(dir string, o mountOptions) (*os.File, error) {
	if os.Geteuid() == 0 {
		return connectDirectly(dir, o)
	}
	return connectByHelper(dir, o)
}

func connectDirectly(dir string, o mountOptions) (*os.File, error) {
	// Not os.OpenFile, which would make it non-blocking for the runtime's poller.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	conn := os.NewFile(uintptr(fd), "/dev/fuse")
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,default_permissions,max_read=%d",
		fd, unix.S_IFDIR, os.Geteuid(), os.Getegid(), o.maxRead)
	if o.allowOther {
		options += ",allow_other"
	}
	var flags uintptr = unix.MS_NOSUID | unix.MS_NODEV
	if o.readOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount(o.source, dir, fsType, flags, options); err != nil {
		conn.Close() // nothing was mounted
		return nil, &os.PathError{Op: "mount", Path: dir, Err: err}
	}
	return conn, nil
}

// connectByHelper has fusermount3 mount and gets the connection from it over a
// socket.
func connectByHelper(dir string, o mountOptions) (*os.File, error) {
	options := []string{
		"default_permissions",
		fmt.Sprintf("max_read=%d", o.maxRead),
		"subtype=" + subtype,
		"fsname=" + strings.NewReplacer(`\`, `\\`, `,`, `\,`).Replace(o.source),
	}
	if o.allowOther {
		options = append(options, "allow_other")
	}
	if o.readOnly {
		options = append(options, "ro")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "socketpair"), os.NewFile(uintptr(pair[1]), "socketpair")
	defer ours.Close()
	err = runHelper(theirs, "-o", strings.Join(options, ","), "--", dir)
	theirs.Close() // the helper has its own
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	conn, err := receiveFile(ours)
	if err != nil {
		return nil, errors.Join(
			fmt.Errorf("mount %s: no connection from the helper: %w", dir, err),
			unmount(dir, true))
	}
	return conn, nil
}

// receiveFile takes a file descriptor out of a socket whose other end is closed.
func receiveFile(socket *os.File) (*os.File, error) {
	data, control := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(socket.Fd()), data, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("recvmsg", err)
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("%d control messages in place of one", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "/dev/fuse"), nil
}

// runHelper runs fusermount3 with extra, if not nil, as its file descriptor 3.
func runHelper(extra *os.File, args ...string) error {
	bin, err := helper()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), helperTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if extra != nil {
		cmd.ExtraFiles = []*os.File{extra}
		cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	}
	if err := cmd.Run(); err != nil {
		if said := strings.TrimSpace(output.String()); said != "" {
			return fmt.Errorf("%w: %s", err, said)
		}
		return fmt.Errorf("%s: %w", filepath.Base(bin), err)
	}
	return nil
}

// helper returns the path of the setuid helper, also for a daemon without PATH.
func helper() (string, error) {
	var missing error
	for _, name := range []string{"fusermount3", "/usr/bin/fusermount3", "/bin/fusermount3"} {
		bin, err := exec.LookPath(name)
		if err == nil {
			return bin, nil
		}
		if missing == nil {
			missing = err
		}
	}
	return "", fmt.Errorf("mounting without being root needs fusermount3 (package fuse3): %w", missing)
}
