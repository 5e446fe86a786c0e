package fs

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOnlyOurMountsHaveAnID(t *testing.T) {
	all, err := parseMountpoints([]byte(`22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 22 0:52 / /mnt/a\040b rw,nosuid shared:1 - fuse.lazyvol lazyvol:vol-1 rw
37 22 0:53 / /mnt/c rw - fuse.sshfs lazyvol:vol-2 rw,user_id=0
38 22 0:54 / /mnt/d ro - fuse.lazyvol lazyvol:snap-1 ro,user_id=0
`))
	if err != nil {
		t.Fatal(err)
	}
	ids := make(map[string]string)
	for _, m := range all {
		ids[m.Dir] = m.ID()
	}
	want := map[string]string{"/": "", "/mnt/a b": "vol-1", "/mnt/c": "", "/mnt/d": "snap-1"}
	if diff := cmp.Diff(want, ids); diff != "" {
		t.Errorf("ids by mountpoint (-want +got):\n%s", diff)
	}
}
