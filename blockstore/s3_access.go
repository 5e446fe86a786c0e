package blockstore

import (
	"context"
	"errors"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
)

// Versioned reports whether a store keeps what is deleted and replaced, as a
// bucket with versioning does: then nothing that is deleted frees anything until
// its old versions expire. s makes single requests: it is as Open returned it.
func Versioned(ctx context.Context, s Store) (bool, error) {
	bucket, ok := s.(*s3Store)
	if !ok {
		return false, nil
	}
	request, cancel := bucket.request(ctx, 0)
	defer cancel()
	out, err := bucket.client.GetBucketVersioning(request, &s3.GetBucketVersioningInput{Bucket: &bucket.bucket})
	if err != nil {
		return false, opError("get the versioning of the bucket of", s, "", s3Error(ctx, err, Condition{}))
	}
	return out.Status == types.BucketVersioningStatusEnabled, nil
}

// lookDenied tells what a Get that was denied found: S3 denies those who may not
// list all of a bucket to read an object that does not exist. Whoever may list
// its very key is told so: ErrNotExist. Else err stays what it was.
func (s *s3Store) lookDenied(ctx context.Context, key string, err error) error {
	if !errors.Is(err, ErrDenied) || ctx.Err() != nil {
		return err
	}
	name, nameErr := s.object(key)
	if nameErr != nil {
		return err
	}
	request, cancel := s.request(ctx, 0)
	defer cancel()
	// The first key with this prefix is the key itself, if there is one.
	out, listErr := s.client.ListObjectsV2(request, &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: name, MaxKeys: aws.Int32(1)})
	if listErr != nil || len(out.Contents) > 0 && aws.ToString(out.Contents[0].Key) == *name {
		return err
	}
	return opError("get", s, key, ErrNotExist)
}
