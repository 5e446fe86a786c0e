package main

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/snapshot"
)

func TestWhoOpensAnImageLearnsWhyItCannotBeOpened(t *testing.T) {
	for _, c := range []struct {
		err, want error
	}{
		{snapshot.ErrNotFound, fs.ErrGone},
		{snapshot.ErrShredded, fs.ErrDenied},
		{crypt.ErrKeyNotFound, fs.ErrDenied},
		{blockstore.ErrDenied, fs.ErrDenied},
		{&os.PathError{Op: "open", Path: "index", Err: unix.EMFILE}, fs.ErrTooMany}, // ulimit -n
		{unix.ENFILE, fs.ErrTooMany},
	} {
		if err := openingError(fmt.Errorf("open it: %w", c.err)); !errors.Is(err, c.want) || !errors.Is(err, c.err) {
			t.Errorf("%v became %v, want %v", c.err, err, c.want)
		}
	}
}
