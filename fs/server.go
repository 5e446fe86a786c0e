package fs

import (
	"fmt"
	"os"
)

// Server answers the kernel for one mount. Its methods may be called at any
// time from any goroutine.
type Server struct {
	mount mountPoint
	conn  *os.File
	done  chan struct{} // closed when all of it has ended

	resized func()
}

// Dir returns the mountpoint, an absolute path without symbolic links.
func (s *Server) Dir() string { return s.mount.path }

// Wait returns when the mount is gone, unmounted by whomever, its last file is
// closed, and no request is left in the Device.
func (s *Server) Wait() { <-s.done }

// Unmount unmounts, unless somebody uses the mount: then everything stays as it
// is and the error is ErrBusy. It is no error if the mount is gone already. The
// last requests may still be running when it returns; Wait waits for them.
func (s *Server) Unmount() error { return s.unmount(false) }

// UnmountLazy takes the mount out of sight, in use or not. Who has its files
// open can go on using them, and the Server goes on serving until the last of
// them is closed.
func (s *Server) UnmountLazy() error { return s.unmount(true) }

func (s *Server) unmount(lazy bool) error {
	if gone, err := s.gone(); gone || err != nil {
		return err
	}
	top, _, err := mountAt(s.mount.path)
	switch {
	case err != nil:
	case top == s.mount:
		err = unmount(s.mount.path, lazy)
	default:
		err = fmt.Errorf("unmount %s: %w: %s is mounted over it", s.mount.path, ErrBusy, top.source)
	}
	if err != nil {
		if gone, _ := s.gone(); gone { // somebody else was faster
			return nil
		}
	}
	return err
}

// gone reports whether the mount exists no more. Its number alone does not
// tell, as another mount may have it by now.
func (s *Server) gone() (bool, error) {
	now, there, err := mountByID(s.mount.id)
	return err == nil && (!there || now != s.mount), err
}
