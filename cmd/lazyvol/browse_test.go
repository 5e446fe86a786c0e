package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/snapshot"
)

func TestStatusNamesEachProblemOfTheStoreOnALineOfItsOwn(t *testing.T) {
	var damaged []error
	for i := range 20_000 {
		damaged = append(damaged, fmt.Errorf("list snap-%d: its record is damaged, and this says at length in which way", i))
	}
	l := &listedFake{found: []snapshot.Description{listing(1, snapshot.Description{})}, err: errors.Join(damaged...)}
	inTree(t, l, func(t *testing.T, tree *browseTree, _ *bytes.Buffer) {
		b := &browser{app: &app{meter: newStoreMeter()}, session: &session{}, tree: tree, shelf: tree.shelf}
		s := b.status()
		if len(s.Errors) != mostProblems+1 || s.Errors[1] != damaged[1].Error() || s.Errors[mostProblems] != "and 19984 more" {
			t.Errorf("%d errors, %q", len(s.Errors), s.Errors[:min(len(s.Errors), 2)])
		}
		if n := len(b.statusJSON()); n > maxStatus {
			t.Errorf("the status has %d bytes, and at most %d are read", n, maxStatus)
		}
		m := &browseMonitor{browser: b}
		if h := m.health(); len(h.Reasons) != 1 || strings.Contains(h.Reasons[0].Message, "\n") {
			t.Errorf("health: %+v", h)
		}
	})
}

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
