package fs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

func TestErrnoTable(t *testing.T) {
	for _, c := range []struct {
		err  error
		want syscall.Errno
	}{
		{nil, 0},
		{unix.ENOSPC, unix.ENOSPC},
		{&os.PathError{Op: "write", Path: "layer", Err: unix.ENOSPC}, unix.ENOSPC},
		{fmt.Errorf("volume: %w", unix.EDQUOT), unix.EDQUOT},
		{unix.EROFS, unix.EROFS},
		{unix.EINVAL, unix.EINVAL},
		{unix.EIO, unix.EIO},
		{unix.ENOMEM, unix.ENOMEM},
		{unix.EOPNOTSUPP, unix.EOPNOTSUPP},
		{context.Canceled, unix.EINTR},
		{fmt.Errorf("read block 7: %w", context.Canceled), unix.EINTR},
		{context.DeadlineExceeded, unix.EIO},
		{errors.Join(context.DeadlineExceeded, unix.ENOSPC), unix.EIO},
		{errors.New("the store said no"), unix.EIO},
		{io.ErrUnexpectedEOF, unix.EIO},
		{os.ErrNotExist, unix.EIO},
		// None of these may get out.
		{unix.ENOSYS, unix.EIO},
		{unix.EAGAIN, unix.EIO},
		{unix.EINTR, unix.EIO},
		{unix.ENOENT, unix.EIO},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", unix.ECONNREFUSED)}, unix.EIO},
	} {
		if got := errnoOf(c.err); got != c.want {
			t.Errorf("%v becomes %s, want %s", c.err, unix.ErrnoName(got), unix.ErrnoName(c.want))
		}
	}
}

func TestEachKindOfFailureIsLoggedOnceInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		f := newFailures(slog.New(slog.NewTextHandler(&log, nil)))
		lines := func() string {
			defer log.Reset()
			return log.String()
		}
		for range 1000 {
			f.errno("read", 4096, 512, errors.New("the store said no"))
			f.errno("write", 0, 512, unix.ENOSPC)
			f.errno("write", 0, 512, unix.EIO)
			f.errno("read", 0, 512, context.Canceled)
			f.errno("read", 0, 512, nil)
			if got := f.panicked("boom"); got != fuse.EIO {
				t.Fatalf("a panic becomes %v", got)
			}
		}
		first := lines()
		if n := strings.Count(first, "\n"); n != 4 || strings.Contains(first, "canceled") {
			t.Errorf("%d lines for four kinds:\n%s", n, first)
		}
		if !strings.Contains(first, `op=read offset=4096 length=512 errno=EIO err="the store said no"`) {
			t.Errorf("it does not say what failed:\n%s", first)
		}
		time.Sleep(quiet)
		f.errno("read", 0, 512, unix.EIO)
		if again := lines(); !strings.Contains(again, "suppressed=999") {
			t.Errorf("after a while: %q", again)
		}
	})
}
