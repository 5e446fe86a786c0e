package fs

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMountedListsOurMountsOnly(t *testing.T) {
	dirs, err := mounted([]byte(`22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 22 0:52 / /mnt/a\040b rw,nosuid shared:1 - fuse.lazyvol lazyvol:vol-1 rw
37 22 0:53 / /mnt/c rw - fuse.sshfs host: rw,user_id=0
38 22 0:54 / /mnt/d ro - fuse.lazyvol lazyvol:snap-1 ro,user_id=0
`))
	if diff := cmp.Diff([]string{"/mnt/a b", "/mnt/d"}, dirs); diff != "" || err != nil {
		t.Errorf("mounted (-want +got), error %v:\n%s", err, diff)
	}
}
