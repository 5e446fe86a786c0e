package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// The flags are those of ../shared/bench/peers.py: each peer as its manual says
// that it is fastest at this.

// qemuFile is qemu's FUSE export of a local raw file: the limit of FUSE.
type qemuFile struct{ b *bench }

const qemuBinary = "qemu-storage-daemon"

func (*qemuFile) name() string                    { return qemuFileName }
func (s *qemuFile) prepare(context.Context) error { return s.b.need(qemuBinary) }

func (s *qemuFile) start(ctx context.Context) (member, error) {
	disk, err := s.b.copyOfImage(ctx, qemuFileName)
	if err != nil {
		return member{}, err
	}
	return s.b.exportByQemu(ctx, s, filepath.Join(filepath.Dir(disk), "export"), "r",
		"driver=file,filename="+disk+",node-name=f,aio=io_uring",
		"driver=raw,file=f,node-name=r")
}

// exportByQemu shows a node of a graph of block devices as a file.
func (b *bench) exportByQemu(ctx context.Context, s system, path, node string, graph ...string) (member, error) {
	binary, err := b.tool(qemuBinary)
	if err != nil {
		return member{}, err
	}
	if err := os.WriteFile(path, nil, 0o644); err != nil { // to be mounted on
		return member{}, err
	}
	var args []string
	for _, device := range graph {
		args = append(args, "--blockdev", device)
	}
	args = append(args, "--export", "type=fuse,id=e,node-name="+node+",mountpoint="+path+",writable=on")
	return b.serve(ctx, s, path, path, nil, binary, args...)
}

// qemuHTTP is a qcow2 file with copy-on-read above the image on the server.
type qemuHTTP struct{ b *bench }

func (*qemuHTTP) name() string                    { return qemuHTTPName }
func (s *qemuHTTP) prepare(context.Context) error { return s.b.need(qemuBinary, "qemu-img") }

func (s *qemuHTTP) start(ctx context.Context) (member, error) {
	dir, err := s.b.folder(qemuHTTPName)
	if err != nil {
		return member{}, err
	}
	overlay := filepath.Join(dir, "overlay.qcow2")
	if _, err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", overlay, fmt.Sprint(s.b.image.size)); err != nil {
		return member{}, err
	}
	return s.b.exportByQemu(ctx, s, filepath.Join(dir, "export"), "cor",
		"driver=http,url="+s.b.server.url()+",readahead=524288,node-name=h,read-only=on",
		"driver=raw,file=h,node-name=hr,read-only=on",
		"driver=file,filename="+overlay+",node-name=qf",
		"driver=qcow2,file=qf,backing=hr,node-name=q",
		"driver=copy-on-read,file=q,node-name=cor")
}

// rclone mounts the bucket with a cache of files.
type rclone struct{ b *bench }

func (*rclone) name() string                    { return rcloneName }
func (s *rclone) prepare(context.Context) error { return s.b.need(rcloneName) }

func (s *rclone) start(ctx context.Context) (member, error) {
	binary, err := s.b.tool(rcloneName)
	if err != nil {
		return member{}, err
	}
	dir, err := s.b.folder(rcloneName)
	if err != nil {
		return member{}, err
	}
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return member{}, err
	}
	server := s.b.server
	return s.b.serve(ctx, s, filepath.Join(mnt, rawKey), mnt, nil, binary, "mount",
		"--s3-provider", "Other", "--s3-access-key-id", server.accessKey, "--s3-secret-access-key", server.secretKey, "--s3-endpoint", server.far,
		"--vfs-cache-mode", "full", "--cache-dir", filepath.Join(dir, "cache"), "--vfs-read-chunk-size", "512k", "--vfs-read-ahead", "8M",
		"--buffer-size", "0", "--vfs-write-back", "1h", // the image in the bucket is to stay as it is
		"--config", "/dev/null", ":s3:"+rawBucket, mnt)
}

// nbdkit is curl with a copy-on-write and copy-on-read layer, through nbdfuse.
type nbdkit struct{ b *bench }

func (*nbdkit) name() string                    { return nbdkitName }
func (s *nbdkit) prepare(context.Context) error { return s.b.need("nbdkit", "nbdfuse") }

func (s *nbdkit) start(ctx context.Context) (member, error) {
	mnt, err := s.b.folder(nbdkitName)
	if err != nil {
		return member{}, err
	}
	return s.b.serve(ctx, s, filepath.Join(mnt, "nbd"), mnt, nil, "nbdfuse", mnt, "--command",
		"nbdkit", "-s", "--filter=cow", "curl", s.b.server.url(), "cow-on-read=true", "cow-block-size=512k")
}

// s3backer keeps an object a block; what is written goes there too, so that
// the bucket is put back before each start.
type s3backer struct{ b *bench }

func (*s3backer) name() string { return s3backerName }

// pristine is the bucket as it was when the image had been written to it.
func (s *s3backer) pristine() string { return s.bucket() + ".pristine" }
func (s *s3backer) bucket() string   { return filepath.Join(s.b.server.dir, blocksBucket) }

func (s *s3backer) args(url, mnt string, more ...string) []string {
	server := s.b.server
	return append([]string{"--quiet", "--accessId=" + server.accessKey, "--accessKey=" + server.secretKey, "--baseURL=" + url + "/",
		"--blockSize=512k", fmt.Sprintf("--size=%d", s.b.image.size), "--compress", "--force", "-f"}, append(more, blocksBucket, mnt)...)
}

func (s *s3backer) prepare(ctx context.Context) error {
	if err := s.b.need(s3backerName); err != nil {
		return err
	}
	mnt, err := s.b.folder("s3backer-fill")
	if err != nil {
		return err
	}
	m, err := s.b.serve(ctx, s, filepath.Join(mnt, "file"), mnt, nil, s3backerName, s.args(s.b.server.direct, mnt, "--blockCacheSize=2048")...)
	if err != nil {
		return err
	}
	defer m.stop()
	if _, err := command(ctx, "dd", "if="+s.b.image.path, "of="+m.path, "bs=512k", "conv=notrunc,fsync", "status=none"); err != nil {
		return err
	}
	m.stop()
	return s.copyBucket(ctx, s.pristine(), s.bucket())
}

// copyBucket replaces a folder of objects by another, of which the server keeps
// the metadata in extended attributes.
func (s *s3backer) copyBucket(ctx context.Context, to, from string) error {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	_, err := command(ctx, "cp", "-a", from, to)
	return err
}

func (s *s3backer) start(ctx context.Context) (member, error) {
	begin := time.Now()
	if err := s.copyBucket(ctx, s.bucket(), s.pristine()); err != nil {
		return member{}, err
	}
	dir, err := s.b.folder(s3backerName)
	if err != nil {
		return member{}, err
	}
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		return member{}, err
	}
	copying := time.Since(begin)
	m, err := s.b.serve(ctx, s, filepath.Join(mnt, "file"), mnt, nil, s3backerName, s.args(s.b.server.far, mnt, "--listBlocks", "--readAhead=16",
		"--blockCacheThreads=32", "--blockCacheSize=2048", "--blockCacheFile="+filepath.Join(dir, "cache"))...)
	m.copying = copying
	return m, err
}
