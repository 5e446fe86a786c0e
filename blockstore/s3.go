package blockstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// s3DeleteBatch is how many keys one DeleteObjects request may name: S3's limit.
const s3DeleteBatch = 1000

// s3Store is a Store in a bucket. Each method but List and a Delete of many keys
// is one request, tried once.
type s3Store struct {
	client  *s3.Client
	bucket  string
	prefix  string // "" or ending in a slash
	url     string
	timeout time.Duration
}

func (s *s3Store) String() string { return s.url }

// object returns the name in the bucket of a key that was checked.
func (s *s3Store) object(key string) (*string, error) {
	name := s.prefix + key
	if len(name) > MaxKeyLen {
		return nil, fmt.Errorf("%w: with the store's prefix, %d bytes are more than %d", ErrKey, len(name), MaxKeyLen)
	}
	return &name, nil
}

// patience returns how long a request that carries n bytes may take: one whose
// bytes come or go slower than s3MinRate, or not at all, ends.
func (s *s3Store) patience(n int64) time.Duration {
	return s.timeout + time.Duration(float64(n)/s3MinRate*float64(time.Second))
}

// request returns the context of one request that carries n bytes.
func (s *s3Store) request(ctx context.Context, n int64) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.patience(n))
}

func (s *s3Store) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	data, etag, err := s.get(ctx, key, min(limit, MaxObjectSize))
	return data, etag, s.lookDenied(ctx, key, opError("get", s, key, s3Error(ctx, err, Condition{})))
}

func (s *s3Store) get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	if err := CheckKey(key); err != nil {
		return nil, "", err
	}
	name, err := s.object(key)
	if err != nil {
		return nil, "", err
	}
	ctx, cancel := s.request(ctx, limit)
	defer cancel()
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: name})
	if err != nil {
		return nil, "", err
	}
	defer out.Body.Close()
	var data bytes.Buffer
	if size := out.ContentLength; size != nil {
		if *size > limit {
			return nil, "", fmt.Errorf("%w: %d bytes, limit %d", ErrTooLarge, *size, limit)
		}
		defer time.AfterFunc(s.patience(*size), cancel).Stop() // it is known now
		data.Grow(int(*size) + bytes.MinRead)
	}
	n, err := data.ReadFrom(io.LimitReader(out.Body, limit+1)) // a body shorter than its length is an error
	if err != nil {
		return nil, "", &bodyError{err}
	}
	if n > limit {
		return nil, "", fmt.Errorf("%w: limit %d", ErrTooLarge, limit)
	}
	return data.Bytes(), unquote(out.ETag), nil
}

func (s *s3Store) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	return opError("read", s, key, s3Error(ctx, s.readRange(ctx, key, off, p), Condition{}))
}

func (s *s3Store) readRange(ctx context.Context, key string, off int64, p []byte) error {
	if err := checkRange(key, off, p); err != nil || len(p) == 0 {
		return err
	}
	name, err := s.object(key)
	if err != nil {
		return err
	}
	ctx, cancel := s.request(ctx, int64(len(p)))
	defer cancel()
	last := off + int64(len(p)) - 1
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{
		Bucket: &s.bucket,
		Key:    name,
		Range:  aws.String(fmt.Sprintf("bytes=%d-%d", off, last)),
	})
	if err != nil {
		return err
	}
	defer out.Body.Close()
	// A server or proxy may ignore the Range header and send the whole object,
	// or send another part of it: its own word is what says which bytes these are.
	if out.ContentRange == nil {
		return errors.New("the server ignored the Range header")
	}
	first, end, err := parseContentRange(*out.ContentRange)
	switch {
	case err != nil:
		return err
	case first != off || end > last:
		return fmt.Errorf("the server sent bytes %d-%d instead of %d-%d", first, end, off, last)
	case end < last:
		return fmt.Errorf("%w: bytes %d-%d, it ends at %d", ErrShort, off, last, end)
	}
	if _, err := io.ReadFull(out.Body, p); err != nil {
		return &bodyError{err}
	}
	return nil
}

// parseContentRange parses the Content-Range header of a partial response,
// "bytes first-last/size", where the size may be "*".
func parseContentRange(header string) (first, last int64, err error) {
	var size string
	if _, err := fmt.Sscanf(header, "bytes %d-%d/%s", &first, &last, &size); err != nil || first < 0 || last < first {
		return 0, 0, fmt.Errorf("the server sent a malformed Content-Range %q", header)
	}
	return first, last, nil
}

func (s *s3Store) Put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	etag, err := s.put(ctx, key, data, c)
	return etag, opError("put", s, key, s3Error(ctx, err, c))
}

func (s *s3Store) put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	if err := checkPut(key, data); err != nil {
		return "", err
	}
	name, err := s.object(key)
	if err != nil {
		return "", err
	}
	input := &s3.PutObjectInput{Bucket: &s.bucket, Key: name, Body: bytes.NewReader(data)}
	if c.Absent() {
		input.IfNoneMatch = aws.String("*")
	}
	if etag, ok := c.Match(); ok {
		if etag == "" { // which some servers take for no condition
			return "", fmt.Errorf("%w: no object has an empty ETag", ErrChanged)
		}
		input.IfMatch = aws.String(`"` + etag + `"`)
	}
	ctx, cancel := s.request(ctx, int64(len(data)))
	defer cancel()
	out, err := s.client.PutObject(ctx, input)
	if err != nil {
		return "", err
	}
	if unquote(out.ETag) == "" {
		return "", errors.New("the server sent no ETag")
	}
	return unquote(out.ETag), nil
}

func (s *s3Store) Delete(ctx context.Context, keys ...string) error {
	var objects []types.ObjectIdentifier
	for _, key := range keys {
		err := CheckKey(key)
		if err == nil {
			var name *string
			name, err = s.object(key)
			objects = append(objects, types.ObjectIdentifier{Key: name})
		}
		if err != nil {
			return opError("delete", s, key, err)
		}
	}
	for len(objects) > 0 {
		n := min(len(objects), s3DeleteBatch)
		if err := s.deleteBatch(ctx, objects[:n]); err != nil {
			return fmt.Errorf("delete %d objects in %s: %w", len(keys), s, s3Error(ctx, err, Condition{}))
		}
		objects = objects[n:]
	}
	return nil
}

func (s *s3Store) deleteBatch(ctx context.Context, objects []types.ObjectIdentifier) error {
	ctx, cancel := s.request(ctx, 0)
	defer cancel()
	out, err := s.client.DeleteObjects(ctx, &s3.DeleteObjectsInput{
		Bucket: &s.bucket,
		Delete: &types.Delete{Objects: objects, Quiet: aws.Bool(true)}, // report failures only
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range out.Errors {
		code := aws.ToString(e.Code)
		if code == "NoSuchKey" {
			continue
		}
		errs = append(errs, withSentinel(sentinel(0, code, Condition{}), fmt.Errorf("%q: %s: %s", aws.ToString(e.Key), code, aws.ToString(e.Message))))
	}
	return errors.Join(errs...)
}

func (s *s3Store) List(ctx context.Context, prefix string, fn func(Info) error) error {
	return s.listAfter(ctx, prefix, "", fn)
}

func (s *s3Store) listAfter(ctx context.Context, prefix, after string, fn func(Info) error) error {
	if err := checkPrefix(prefix); err != nil {
		return opError("list", s, prefix, err)
	}
	input := &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: aws.String(s.prefix + prefix)}
	if after != "" {
		input.StartAfter = aws.String(s.prefix + after)
	}
	for {
		page, err := s.listPage(ctx, input)
		if err != nil {
			return opError("list", s, prefix, s3Error(ctx, err, Condition{}))
		}
		for _, info := range page.infos {
			if info.Key <= after {
				return opError("list", s, prefix, fmt.Errorf("the server listed %q after %q", info.Key, after))
			}
			after = info.Key
			if err := fn(info); err != nil {
				return err
			}
		}
		if page.next == "" {
			return nil
		}
		input.ContinuationToken = &page.next
	}
}

type s3Page struct {
	infos []Info
	next  string // continuation token; "" on the last page
}

func (s *s3Store) listPage(ctx context.Context, input *s3.ListObjectsV2Input) (*s3Page, error) {
	ctx, cancel := s.request(ctx, 0)
	defer cancel()
	out, err := s.client.ListObjectsV2(ctx, input)
	if err != nil {
		return nil, err
	}
	page := new(s3Page)
	if aws.ToBool(out.IsTruncated) {
		if page.next = aws.ToString(out.NextContinuationToken); page.next == "" {
			return nil, errors.New("the server sent a page that is not the last one and no way to the next")
		}
	}
	now, known := awsmiddleware.GetServerTime(out.ResultMetadata) // the Date header
	for _, object := range out.Contents {
		name := aws.ToString(object.Key)
		if !strings.HasPrefix(name, *input.Prefix) {
			return nil, fmt.Errorf("the server listed %q under the prefix %q", name, *input.Prefix)
		}
		info := Info{Key: name[len(s.prefix):], Size: aws.ToInt64(object.Size), ETag: unquote(object.ETag)}
		if CheckKey(info.Key) != nil {
			continue // not ours: the prefix as a "folder", for instance
		}
		if known {
			info.Listed = now
		}
		if known && object.LastModified != nil {
			info.Age = max(0, now.Sub(*object.LastModified))
		}
		page.infos = append(page.infos, info)
	}
	return page, nil
}

// unquote returns an ETag as this package has it: some servers quote it in
// headers but not in listings.
func unquote(etag *string) string { return strings.Trim(aws.ToString(etag), `"`) }
